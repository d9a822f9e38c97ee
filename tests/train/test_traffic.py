"""The bytes of a step are those of the table in docs/numbers.md, derived from shapes, dtypes and the layout alone."""

from collections import Counter
from typing import Any

import pytest

from minka.plan.config import RunConfig
from minka.plan.layout import micro_batches
from minka.train.dry_run import DryRun
from traced import config_of, dry

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shard 2, kept": ({"shard": 2, "precision": "bf16", "reshard": "never"}, {}),
    "shard 2, freed": ({"shard": 2, "precision": "bf16", "reshard": "always"}, {}),
    "shard 2, freed, recompute": ({"shard": 2, "precision": "bf16", "reshard": "always", "recompute": "block"}, {}),
    "shard 4, fp32": ({"shard": 4, "precision": "fp32", "reshard": "always"}, {}),
    "shard 2, reduced each time": ({"shard": 2, "precision": "bf16", "reduce": "micro_batch"}, {}),
    "replicate 2 x shard 2, reduced each time": (
        {"replicate": 2, "shard": 2, "precision": "fp32", "micro_batch": 1, "reduce": "micro_batch"},
        {},
    ),
    "shard 2 x tensor 2, reduced each time": ({"shard": 2, "tensor": 2, "reduce": "micro_batch"}, {"qk_norm": True}),
    "replicate 2 x shard 2": ({"replicate": 2, "shard": 2, "precision": "bf16", "reshard": "never"}, {}),
    "tensor 2": ({"tensor": 2}, {}),
    "tensor 4, QK-norm": ({"tensor": 4, "micro_batch": 1}, {"qk_norm": True}),
    "tensor 2, recompute": ({"tensor": 2, "recompute": "block"}, {}),
    "tensor 2, selective": ({"tensor": 2, "recompute": "selective"}, {}),
    "context 4, selective": ({"context": 4, "recompute": "selective", "reshard": "never"}, {}),
    "context 2": ({"context": 2}, {}),
    "context 4, recompute": ({"context": 4, "recompute": "block", "reshard": "never"}, {}),
    "pipeline 2": ({"pipeline": 2}, {}),
    "pipeline 4": ({"pipeline": 4, "micro_batch": 1}, {}),
    "pipeline 2, interleaved": ({"pipeline": 2, "schedule": "interleaved"}, {}),
    "pipeline 2, zbv": ({"pipeline": 2, "schedule": "zbv"}, {}),
    "shard 2 x context 2 x tensor 2": ({"shard": 2, "context": 2, "tensor": 2, "precision": "bf16"}, {}),
    "pipeline 2 x shard 2 x tensor 2": ({"pipeline": 2, "shard": 2, "tensor": 2, "precision": "bf16"}, {}),
}


FAST = ("shard 2, freed", "tensor 2", "tensor 2, selective")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in LAYOUTS])
def test_a_step_sends_what_the_table_says(name: str) -> None:
    layout, model = LAYOUTS[name]
    config = config_of(layout, **model)
    for rank in sorted({0, config.layout.world - 1}):
        predicted = dry(config, rank, unit_bytes=1)  # every block is an FSDP unit
        found: Counter[tuple[str, str, str]] = Counter()
        for transfer, size in predicted.payload_bytes.items():
            found[transfer.axis, transfer.kind, transfer.dtype] += size
        wanted = derived(config, predicted)
        print(name, rank, dict(found))
        assert dict(found) == {what: size for what, size in wanted.items() if size}


def derived(config: RunConfig, predicted: DryRun) -> Counter[tuple[str, str, str]]:
    """The table, by (axis, kind, dtype), for the rank of `predicted`; only its coordinate and layers are used."""
    m, layout, tokens = config.model, config.layout, config.data.seq_len
    n, c, a = layout.tensor, layout.context, max(micro_batches(layout, config.data))
    w, compute = (2, "bfloat16") if layout.precision == "bf16" else (4, "float32")
    again, freed = layout.recompute != "none", layout.reshard == "always"
    layers, place = len(predicted.layers), predicted.coordinate["pipeline"]
    stages = layout.stages_of_rank(place)
    first, last = 0 in stages, layout.stage_count - 1 in stages
    e, hidden = m.head_dim, layout.micro_batch * tokens // c * m.d_model

    norms = layers * (2 * m.d_model + (2 * e if m.qk_norm else 0)) + last * m.d_model
    matrix = 2 * m.d_model * (m.heads + m.kv_heads) * e + 3 * m.d_model * m.d_ff
    blocks = layers * (matrix // n) + norms - last * m.d_model
    whole = blocks + last * m.d_model + (first + last) * m.vocab * m.d_model // n

    sent: Counter[tuple[str, str, str]] = Counter()
    ways = layout.shard * c
    sums = a if layout.reduce == "micro_batch" and ways > 1 else 1  # of gradients, in a step
    if ways > 1:
        sent["data", "all_gather", compute] = w * (whole + (blocks * (2 * a - 1) if freed else 0))
        sent["data", "reduce_scatter", "float32"] = sums * 4 * whole
    if layout.replicate > 1:
        sent["replicate", "all_reduce", "float32"] = 4 * whole // ways
    if n > 1:
        sent["tensor", "all_gather", compute] = a * w * hidden * (layers * (6 if again else 4) + first + last)
        scattered = 5 if layout.recompute == "block" else 4
        sent["tensor", "reduce_scatter", compute] = a * w * hidden * (layers * scattered + first + last)
        loss = 3 * 4 * layout.micro_batch * tokens // c if last else 0
        sent["tensor", "all_reduce", "float32"] = sums * 4 * norms + a * loss
    if c > 1:
        gathered = w * layout.micro_batch * tokens * m.kv_heads // n * 2 * e
        sent["context", "all_gather", compute] = a * layers * gathered * (2 if again else 1)
        sent["context", "reduce_scatter", compute] = a * layers * gathered
    # Each end of a stage that is another rank's passes hidden states one way and their gradients the other.
    borders = [pair for s in stages for pair in ((s - 1, s), (s, s + 1)) if 0 <= pair[0] < pair[1] < layout.stage_count]
    away = sum(layout.rank_of_stage(one) != layout.rank_of_stage(other) for one, other in borders)
    for kind in ("send", "receive"):
        sent["pipeline", kind, compute] = away * a * w * hidden // n
    if layout.world > 1:  # the step's loss and its gradient norm
        cut = [axis for axis in ("pipeline", "replicate", "tensor") if getattr(layout, axis) > 1]
        cut += ["data"] if ways > 1 else []
        over = cut[0] if len(cut) == 1 else "all"
        sent[over, "all_reduce", "float32"] += 8
        sent[over, "all_reduce", "float64"] += 8
    return sent
