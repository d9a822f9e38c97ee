"""The sections of a run's configuration: frozen values, with units in the names or the descriptions.

Rules on one section follow its fields; rules across sections are in config.py.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

Range = Annotated[tuple[int, int], Field(strict=False)]
Name = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Section(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """Base of every section. Unknown keys and values of a different type are errors; a list is accepted for a tuple."""


class RunSection(Section):
    """What the run is called and when it ends: exactly one of max_steps and max_tokens."""

    name: str = Field(pattern=Name, max_length=100, description="folder under run.folder")
    seed: int = Field(0, ge=0, lt=2**63, description="initial weights and sample order follow from it")
    max_steps: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    folder: str = Field("runs", min_length=1)
    start_from: str = Field("", description="RUN, RUN@STEP or a Hugging Face folder; empty: from new weights")
    start_with: Literal["weights", "all"] = Field("weights", description="all: optimizer, counters, data position too")

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError("give exactly one of run.max_steps and run.max_tokens")
        if self.start_with == "all" and not self.start_from:
            raise ValueError('run.start_with="all" needs run.start_from')
        return self


class RopeScaling(Section):
    """Llama-3's frequency scaling (Llama 3.1 model card): long wavelengths are stretched by `factor`."""

    factor: float = Field(8.0, ge=1)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_max_positions: int = Field(8192, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")
        return self


class ModelSection(Section):
    """Shape of a Llama-like decoder (RoPE, grouped-query attention, SwiGLU, RMSNorm)."""

    layers: int = Field(ge=1)
    d_model: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2, description="even: RoPE rotates pairs")
    d_ff: int = Field(ge=1)
    vocab: int = Field(ge=256, description="rows of the embedding; 256 means plain bytes")
    tied: bool = Field(False, description="head shares the embedding's weights")
    qkv_bias: bool = False
    qk_norm: bool = Field(False, description="RMSNorm on each query and key head")
    rope_theta: float = Field(10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    norm_eps: float = Field(1e-5, gt=0)
    max_positions: int = Field(8192, ge=1, description="written to the export; training uses data.seq_len")
    init_std: float = Field(0.02, gt=0, description="output projections use init_std / sqrt(2 layers)")
    z_loss: float = Field(0.0, ge=0, description="weight of mean(logsumexp^2), never in the reported loss")

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.heads % self.kv_heads:
            works = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(f"kv_heads must divide heads={self.heads}: one of {works}")
        return self


class BatchStage(Section):
    """One step of a batch warm-up: `batch_tokens` a step until `until_tokens` have been consumed."""

    until_tokens: int = Field(ge=1)
    batch_tokens: int = Field(ge=1)


class DataSection(Section):
    """Where the tokens come from, and how they are cut into sequences and batches."""

    source: Literal["stdlib", "text", "jsonl", "parquet", "datasets"] = "stdlib"
    paths: tuple[str, ...] = Field((), strict=False, description="files, folders or globs for text, jsonl and parquet")
    dataset: str = Field("", description="first argument of datasets.load_dataset")
    dataset_config: str = ""
    dataset_split: str = "train"
    text_field: str = Field("text", description="path to the text in a row: a.b, list[0], list[].b")
    id_field: str = Field("", description="path to the id; empty: the column of that name, where there is one")
    source_field: str = ""
    url_field: str = ""
    licence_field: str = ""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    split_on: str = Field("", description="text files are cut into documents at this separator")
    chunk_bytes: int = Field(0, ge=0, description="a document of a text file is cut where it is larger; 0 = never")
    tokenizer: str = Field("bpe", min_length=1, description="bpe (trained), bytes, or a Hugging Face folder or name")
    store: str = Field("", description="token store folder; empty: stores/ and a name made from this section")
    validation_fraction: float = Field(0.01, gt=0, lt=1, description="of documents, by content hash")
    max_bytes: int = Field(0, ge=0, description="read at most this much text; 0 = all")
    seq_len: int = Field(ge=2, description="tokens in a sequence")
    batch_tokens: int = Field(ge=1, description="tokens in a global batch; a multiple of seq_len")
    batch_warmup: tuple[BatchStage, ...] = Field((), strict=False, description="smaller batches at the beginning")
    dropped_samples: tuple[Range, ...] = Field((), strict=False, description="[first, last) ranges left out")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        batches = [("batch_tokens", self.batch_tokens)]
        batches += [(f"batch_warmup[{i}].batch_tokens", s.batch_tokens) for i, s in enumerate(self.batch_warmup)]
        for name, tokens in batches:
            if tokens % self.seq_len:
                down = tokens // self.seq_len * self.seq_len
                near = [n for n in (down, down + self.seq_len) if n]
                raise ValueError(f"{name}={tokens} is not a multiple of seq_len={self.seq_len}; nearest: {near}")
        ends = [stage.until_tokens for stage in self.batch_warmup]
        if ends != sorted(set(ends)):
            raise ValueError("batch_warmup must be in rising order of until_tokens")
        if self.source in ("text", "jsonl", "parquet") and not (self.paths and all(map(str.strip, self.paths))):
            raise ValueError(f'source="{self.source}" needs paths = ["..."], none of them empty')
        if self.source != "text" and (self.split_on or self.chunk_bytes):
            raise ValueError('split_on and chunk_bytes are for source="text"; a row is a document already')
        if 0 < self.chunk_bytes < 64:
            raise ValueError(f"chunk_bytes={self.chunk_bytes} is not 0 and not 64 or more")
        if self.source == "datasets" and not self.dataset:
            raise ValueError('source="datasets" needs dataset = "..."')
        edges = [0, *(edge for dropped in self.dropped_samples for edge in dropped)]
        if edges != sorted(edges) or any(first == end for first, end in self.dropped_samples):
            raise ValueError("dropped_samples must be rising, disjoint [first, last) ranges")
        return self


class OptimizerSection(Section):
    """AdamW (Loshchilov & Hutter 2019), decoupled decay, on local shards."""

    learning_rate: float = Field(gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="on matrices; never on norms and biases")
    decay_embeddings: bool = Field(False, description="decay the embedding, and the head where it is not tied, too")
    max_norm: float = Field(1.0, gt=0, description="global gradient norm is clipped to this")
    weights: Literal["fp32", "bf16"] = Field("fp32", description="stored as; bf16 is rounded stochastically")
    moments: Literal["fp32", "bf16"] = Field("fp32", description="stored as, and rounded, the same way")


class ScheduleSection(Section):
    """Learning rate over the run: linear warm-up, then a decay to final_ratio of the peak."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    unit: Literal["steps", "tokens"] = "steps"
    warmup: int = Field(0, ge=0, description="in schedule.unit")
    decay: int = Field(0, ge=0, description="length of the last part of wsd, in schedule.unit; 0 = a fifth of the run")
    final_ratio: float = Field(0.1, ge=0, le=1)


class CheckpointSection(Section):
    """When the run is saved; it is always saved at the end and on a stop."""

    every_steps: int = Field(0, ge=0, description="0 = only at the end and on a stop")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay")
    keep_every_steps: int = Field(0, ge=0, description="checkpoints at multiples of it are kept forever; 0 = none")
    keep_tokens: tuple[int, ...] = Field((), strict=False, description="saved after so many tokens and kept forever")
    folder: str = Field("", description="where a run's checkpoints go, on another disk; empty: into the run's folder")
    asynchronous: bool = Field(True, description="write from a copy while training continues")
    export: bool = Field(True, description="write a Hugging Face folder at the end and on a stop")


class GuardSection(Section):
    max_refused_steps: int = Field(20, ge=1, description="refused steps in a row before the run stops with status 86")
    hang_seconds: float = Field(600.0, gt=0, description="without a heartbeat from a rank: stacks, then stop")


class PlanSection(Section):
    """What was planned for the run (`minka plan budget --emit`): figures that it is held against."""

    law: str = Field("", description="of the loss, by which it was planned")
    loss: float | None = Field(None, gt=0, description="nats a token at the end")
    loss_low: float | None = Field(None, gt=0, description="90 % of such runs end above it")
    loss_high: float | None = Field(None, gt=0, description="and below this")
    dollars_per_gpu_hour: float | None = Field(None, ge=0)


class EvalSection(Section):
    """Bits per byte on the validation split, and samples, at a cadence and at the end."""

    every_steps: int = Field(0, ge=0)
    every_tokens: int = Field(0, ge=0)
    max_documents: int = Field(0, ge=0, description="of the validation split, in order; 0 = all")
    batch_sequences: int = Field(8, ge=1, description="sequences a rank evaluates at once")
    prompts: tuple[str, ...] = Field((), strict=False, description="prompts that are continued at each evaluation")
    sample_tokens: int = Field(48, ge=1)
    temperature: float = Field(0.0, ge=0, description="0 = greedy")


class TrackingSection(Section):
    log_every: int = Field(10, ge=1, description="steps between two readings of the device's metrics")
    detail_every: int = Field(0, ge=0, description="steps between per-layer norms, update ratios, attention logits")
    record_samples: bool = Field(False, description="each rank writes the sample ids of every step to logs/")
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "minka"
    tensorboard: bool = False


Implementation = Literal["auto", "triton", "torch"]


class KernelsSection(Section):
    implementation: Implementation = Field("auto", description="auto: what was measured fastest on this kind of GPU")
    rms_norm: Implementation | None = Field(None, description="this operation's own; none: implementation")
    rope: Implementation | None = None
    swiglu: Implementation | None = None
    cross_entropy: Implementation | None = Field(None, description="softmax, loss and gradient of a chunk of logits")
    adamw: Implementation | None = Field(None, description="all weights in one launch")
    grad_norm: Implementation | None = Field(None, description="all gradients in one launch")
    attention: Literal["auto", "sdpa", "varlen", "flex", "triton", "flash-attn"] = Field(
        "auto", description="whose kernels"
    )
    compile: bool = Field(False, description="torch.compile each block")

    def asked(self) -> dict[str, str]:
        """The implementation that is asked for, by operation."""
        own = {
            "rms_norm": self.rms_norm,
            "rope": self.rope,
            "swiglu": self.swiglu,
            "cross_entropy": self.cross_entropy,
            "adamw": self.adamw,
            "grad_norm": self.grad_norm,
        }
        return {"attention": self.attention, **{name: one or self.implementation for name, one in own.items()}}
