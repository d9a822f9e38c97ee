"""Choices that decide a rank's memory and traffic, as functions of numbers. Training and predictions call the same.

A kind of device is torch's word for it: "cuda" or "cpu".
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from minka.plan.layout import Layout

ComputeDtype = Literal["fp32", "bf16", "fp64"]
AttentionKind = Literal["causal", "mask", "varlen"]

# Consecutive blocks are gathered together until a unit has this many bytes: smaller messages are all latency. Measured
# with gloo on two cores (LOG.md): a 1M-parameter model in one unit loses 2 % to sharding, block by block 5 %.
UNIT_BYTES = 32 * 2**20
# Gathered weights up to this size stay until backward under reshard = "auto": a second gather costs more than they do.
KEEP_BYTES = 2 * 2**30
CPU_ROWS = 512  # tokens whose logits exist at once: 256 to 1024 were equal on two cores, fewer and more were slower
GPU_LOGITS = 2**28  # 1 GiB of fp32: thousands of tokens a product, which cuBLAS needs for its full rate


def compute_dtype_name(layout: Layout, device_kind: str) -> ComputeDtype:
    """Return the dtype of activations and products; `precision = "auto"` is bf16 on a GPU, else fp32."""
    if layout.precision == "auto":
        return "bf16" if device_kind == "cuda" else "fp32"
    return layout.precision


def needs_fsdp(layout: Layout, *, casts: bool) -> bool:
    """Return whether FSDP has work: weights to cut, to cast (to bf16), or to fetch from the host's memory."""
    return layout.replicate * layout.shard * layout.context > 1 or casts or layout.offload != "none"


def fsdp_units(block_bytes: Sequence[int]) -> list[range]:
    """Group consecutive blocks into units of at least UNIT_BYTES; no units where all blocks together are smaller.

    `block_bytes` has each block's bytes in the compute dtype, in the order the blocks run, whatever tensor parallelism
    leaves of them on a rank. A short rest joins the last unit if it has at most half as many blocks.
    """
    units: list[range] = []
    first = size = 0
    for last, added in enumerate(block_bytes):
        size += added
        if size >= UNIT_BYTES:
            units.append(range(first, last + 1))
            first, size = last + 1, 0
    rest = range(first, len(block_bytes))
    if not rest or not units:
        return units
    if len(rest) * 2 <= len(units[-1]):
        return [*units[:-1], range(units[-1].start, rest.stop)]
    return [*units, rest]


def frees_gathered_weights(layout: Layout, blocks_bytes: int) -> bool:
    """Return whether blocks' gathered weights are freed after forward; if not, they stay until a step's last backward.

    `blocks_bytes` is that of all blocks on a rank, in the compute dtype.
    """
    if layout.reshard != "auto":
        return layout.reshard == "always"
    # In a pipeline every micro-batch would gather them again, and a split backward needs those of its forward.
    return layout.pipeline == 1 and blocks_bytes > KEEP_BYTES


def logit_rows(vocab: int, device_kind: str) -> int:
    """Return how many tokens' logits exist at once on a rank that holds `vocab` rows of the vocabulary."""
    return CPU_ROWS if device_kind == "cpu" else max(CPU_ROWS, GPU_LOGITS // vocab)


def attention_kind(setting: str, device_kind: str, dtype: str, *, packed: bool = True) -> AttentionKind:
    """Return how attention keeps documents apart under `kernels.attention`: by variable-length kernels or by a mask.

    `packed` says whether rows may hold several documents; otherwise plain causal attention will do. `dtype` is a
    compute dtype; fp16 is as good as bf16. Where variable-length kernels cannot run, a mask replaces them.
    """
    possible = device_kind == "cuda" and dtype in ("bf16", "fp16")
    if not packed:
        return "causal"
    return "varlen" if possible and setting != "sdpa" else "mask"


def compiles_full_graph(layout: Layout) -> bool:
    """Return whether a compiled block is one graph: recomputation and the gather of keys and values break it."""
    return layout.recompute == "none" and layout.context == 1


def replaceable_kernels(asked: Mapping[str, str], *, bf16_state: bool) -> str:
    """Return what a different machine may replace in a run, in one line; empty where every machine runs the same.

    `asked` is KernelsSection.asked(). `bf16_state` says that weights or moments are bf16.
    """
    own = {name: way for name, way in asked.items() if way not in ("auto", "torch", "sdpa")}
    lines = []
    if own:
        names = ", ".join(f"{name} ({way})" for name, way in own.items())
        lines.append(f"kernels: {names} run where the machine can run them; elsewhere torch's definition, and sdpa for "
                     "attention, run instead, and the run says so when it starts")  # fmt: skip
    if bf16_state:
        where = "where Triton cannot run" if asked["adamw"] != "torch" else "as asked for"
        lines.append(f"kernels.adamw: the definition updates bf16 weights or moments {where}, many times slower")
    return "; ".join(lines)
