"""Small models, batches and random weights for the tests of model/."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minka.kernels.cross_entropy import IGNORED
from minka.model.hub_folder import read_tensors
from minka.model.transformer import Transformer
from minka.plan.config_sections import ModelSection
from minka.plan.hub_config import read_config, to_config

SHAPE: dict[str, Any] = {
    "layers": 2,
    "d_model": 48,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 12,
    "d_ff": 80,
    "vocab": 300,
    "init_std": 0.1,
}


def section(**fields: Any) -> ModelSection:
    """A small model's shape, with `fields` laid over it."""
    return ModelSection(**SHAPE | fields)


def model(cfg: ModelSection) -> Transformer:
    """A model every weight of which is random: norms and biases too, so that none can be left out unseen."""
    built = Transformer(cfg)
    perturb(built)
    return built


@torch.no_grad()
def perturb(built: torch.nn.Module) -> None:
    """Random numbers into every parameter; norms about 1."""
    for name, parameter in built.named_parameters():
        parameter.normal_(std=0.15)
        if "norm" in name:
            parameter.add_(1)


def from_folder(folder: Path) -> Transformer:
    """The model that a Hugging Face folder holds."""
    cfg = read_config(folder)
    built = Transformer(cfg)
    parameters = dict(built.named_parameters())
    with torch.no_grad():
        for name, tensor in read_tensors(folder, cfg):
            parameters.pop(name).copy_(tensor)
    assert not parameters
    return built


def from_section(cfg: ModelSection, family: str = "auto") -> Any:
    """transformers' model of the same shape, with its own random weights perturbed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = to_config(cfg, family, None, "float32")
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    perturb(theirs)
    return theirs


def load_theirs(folder: Path) -> Any:
    """transformers' model of a folder, all of whose weights are its own."""
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


def plain(tokens: Tensor) -> tuple[Tensor, None, Tensor]:
    """Arguments of Transformer.forward for rows of one document each."""
    return tokens, None, torch.arange(tokens.shape[1]).expand_as(tokens)


def packed(rows: int, length: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random tokens, documents, positions, targets: uneven documents, some of one token, a fifth of targets ignored."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(rows, length, generator=generator) < 0.15
    begins[:, 0] = True
    documents = begins.cumsum(1)
    at = torch.arange(length).expand(rows, length)
    positions = at - torch.where(begins, at, 0).cummax(1).values
    tokens, targets = torch.randint(0, vocab, (2, rows, length), generator=generator)
    return (
        tokens,
        documents,
        positions,
        targets.masked_fill(torch.rand(rows, length, generator=generator) < 0.2, IGNORED),
    )
