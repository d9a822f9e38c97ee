"""What 16,384 ranks would write of llama3-405b (16 stages, 128 shards, 8 tensor ranks), computed without any ranks."""

from collections.abc import Iterator
from typing import NamedTuple

from minka.plan.load_config import load_run

STAGES, SHARDS, TENSOR = 16, 128, 8
RANKS = STAGES * SHARDS * TENSOR
KINDS = ("model", "moment1", "moment2")


class Box(NamedTuple):
    """What a rank holds of a tensor."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]


class Weight(NamedTuple):
    """`dim` is the one that the tensor group cuts; None where each of it has a copy."""

    name: str
    shape: tuple[int, ...]
    dim: int | None


def stage_of(rank: int) -> int:
    return rank // (SHARDS * TENSOR)


def weights(stage: int) -> Iterator[Weight]:
    """All weights of a stage."""
    model = load_run("llama3-405b", []).config.model
    d, kv, ff = model.d_model, model.kv_heads * model.head_dim, model.d_ff
    first, last = (model.layers * at // STAGES for at in (stage, stage + 1))
    if stage == 0:
        yield Weight("embed.weight", (model.vocab, d), 0)
    for layer in range(first, last):
        for name, shape, dim in (
            ("attention_norm", (d,), None),
            ("attention.q", (d, d), 0),
            ("attention.k", (kv, d), 0),
            ("attention.v", (kv, d), 0),
            ("attention.o", (d, d), 1),
            ("mlp_norm", (d,), None),
            ("mlp.gate", (ff, d), 0),
            ("mlp.up", (ff, d), 0),
            ("mlp.down", (d, ff), 1),
        ):
            yield Weight(f"layers.{layer}.{name}.weight", shape, dim)
    if stage == STAGES - 1:
        yield Weight("norm.weight", (d,), None)
        yield Weight("head.weight", (model.vocab, d), 0)


def boxes(rank: int, found: list[Weight], shards: int = SHARDS, *, copies: bool = False) -> dict[str, Box]:
    """What rank `rank` of a stage of `shards` x TENSOR writes of its weights and moments: copies of a norm take turns.

    With `copies`, what it holds.
    """
    data, part = rank // TENSOR % shards, rank % TENSOR
    written = {}
    for kind in KINDS:
        for number, (name, shape, dim) in enumerate(found):
            if dim is None and number % TENSOR != part and not copies:
                continue
            offset, size = [0] * len(shape), list(shape)
            for cut, ways, at in ((dim, TENSOR, part), (0, shards, data)):
                if cut is not None:
                    each = -(-size[cut] // ways)
                    start = min(size[cut], each * at)
                    offset[cut], size[cut] = offset[cut] + start, min(each, size[cut] - start)
            if min(size):
                written[f"{kind}.{name}"] = Box(shape, tuple(offset), tuple(size))
    return written
