"""The families of Hugging Face models that minka writes, and which of them can represent a model."""

from minka.plan.config_sections import ModelSection
from minka.plan.errors import UserError

TRAINED = {family.lower(): f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}


def family_of(cfg: ModelSection) -> str:
    """The family that an export of `cfg` is written as: the first that can represent it.

    Raises UserError, which says what to change, where there is none.
    """
    for family in TRAINED:
        if not misfit(cfg, family):
            return family
    what = f"no Hugging Face model has both qkv_bias={cfg.qkv_bias} and qk_norm={cfg.qk_norm}"
    why = "only qwen2 has biases on q, k and v, and only qwen3 has norms on q and k"
    raise UserError(what, where="model", why=why, remedy="set model.qkv_bias=false or model.qk_norm=false")


def misfit(cfg: ModelSection, family: str) -> str:
    """Why `family` cannot represent `cfg`; empty where it can. Mistral is Llama without LlamaConfig's checks."""
    if (cfg.qkv_bias, cfg.qk_norm) != (family == "qwen2", family == "qwen3"):
        return f"{family} cannot represent qkv_bias={cfg.qkv_bias} with qk_norm={cfg.qk_norm}"
    if family == "llama" and cfg.d_model % cfg.heads:
        return f"transformers refuses a Llama whose d_model={cfg.d_model} is not a multiple of heads={cfg.heads}"
    if family == "llama" and cfg.init_std > 1:
        return f"transformers refuses a Llama with init_std={cfg.init_std}, which is above 1"
    return ""


def reader_limits(cfg: ModelSection) -> str:
    """What a reader of the export of `cfg` would get wrong without an error, as one sentence; empty where none would.

    llama.cpp: convert_hf_to_gguf.py writes the factors of llama3's frequencies for Llama and Mistral only
    (ggml-org/llama.cpp, conversion/llama.py). transformers: Mistral reads rope_scaling from 4.48 on.
    """
    family = family_of(cfg)
    if cfg.rope_scaling is None or family == "llama":
        return ""
    if family == "mistral":
        return "the export is a Mistral with rope_scaling: transformers before 4.48 drops the scaling without an error"
    return f"the export is a {family} with rope_scaling: llama.cpp's converter drops the scaling without an error"
