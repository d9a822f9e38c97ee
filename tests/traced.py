"""A step of a small model as it is traced on real ranks, as the allocator counts it, and as a dry run predicts it."""

import json
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from minka.parallel.apply import build_parts
from minka.parallel.inputs import InputCutter
from minka.parallel.memory_trace import MemoryTrace, Peak
from minka.parallel.mesh import start_mesh
from minka.parallel.traffic import Transfer
from minka.plan import execution_choices
from minka.plan.config import RunConfig
from minka.plan.load_config import validate
from minka.plan.memory import RankMemory, predict_memory
from minka.train.build_engine import engine_over
from minka.train.dry_run import DryRun, dry_run, traced_step
from parity import packed_batch
from ranks import on_ranks

SHAPE = {"layers": 4, "d_model": 256, "heads": 8, "kv_heads": 4, "head_dim": 32, "d_ff": 512, "vocab": 512}
LENGTH, ROWS = 128, 16
UNIT_BYTES = execution_choices.UNIT_BYTES


class Patient(TorchDispatchMode):
    """gloo's threads let go of what they have sent a moment after it is waited for: wait until they rest again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if "c10d" in func.namespace:
            time.sleep(0.002)
            while not _at_rest():
                time.sleep(0.002)
        return found


def _at_rest() -> bool:
    """Whether no thread of this process that carries out gloo's collectives is running, or waits for a processor."""
    stats = [(task / "stat").read_text() for task in Path("/proc/self/task").iterdir()]
    return not any("gloo" in stat and stat.rsplit(")", 1)[1].split()[0] == "R" for stat in stats)


class Real(NamedTuple):
    """Of one rank: memory of two steps, traffic of the second; a pipeline's ranks find each other in the first."""

    peak: Peak
    calls: dict[Transfer, int]
    payload_bytes: dict[Transfer, int]
    allocated: int  # the allocator's own peak in both steps, bytes


def config_of(layout: Mapping[str, Any], **model: Any) -> RunConfig:
    """A run of ROWS packed rows a step under `layout`, which may say what the optimizer stores, too."""
    stored = {key: layout[key] for key in ("weights", "moments") if key in layout}
    layout = {key: value for key, value in layout.items() if key not in stored}
    values: dict[str, Any] = {
        "run": {"name": "traced", "max_steps": 4},
        "model": {**SHAPE, **model},
        "data": {"tokenizer": "bpe", "seq_len": LENGTH, "batch_tokens": ROWS * LENGTH},
        "optimizer": {"learning_rate": 1e-3, **stored},
        "layout": {"shard": 1, "micro_batch": 2, **layout},
    }
    return validate(values, "tests/traced.py")


def real(config: RunConfig, *, unit_bytes: int = UNIT_BYTES) -> list[Real]:
    """On as many ranks as the layout has."""
    ranks = on_ranks(_rank, config.layout.world, config, unit_bytes)
    return [Real(Peak(*found[0]), *found[1:]) for found in ranks]


def dry(config: RunConfig, rank: int, *, unit_bytes: int = UNIT_BYTES) -> DryRun:
    """The dry run of one of them."""
    with patch.object(execution_choices, "UNIT_BYTES", unit_bytes):
        return dry_run(config, config.layout.world, rank, as_gpu=False)


def planned(config: RunConfig, *, unit_bytes: int = UNIT_BYTES) -> tuple[RankMemory, ...]:
    """What `minka plan memory` says of a machine's cores."""
    with patch.object(execution_choices, "UNIT_BYTES", unit_bytes):
        return predict_memory(config, config.layout.world, "cpu")


def _rank(config: RunConfig, unit_bytes: int) -> tuple[Any, ...]:
    execution_choices.UNIT_BYTES = unit_bytes
    casts = config.optimizer.weights == "bf16"
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
        start_mesh(config.layout, casts=casts) as mesh,
    ):
        engine, optimizer = engine_over(build_parts(config, mesh), InputCutter(mesh, varlen=False), config)
        ways, size = config.layout.data_ways, config.layout.micro_batch
        count, memory = ROWS // ways // size, MemoryTrace()
        with Patient(), record_function("both steps"):
            for step in range(2):
                batches = [
                    engine.prepare(packed_batch(size, LENGTH, config.model.vocab, seed=step * count + n))
                    for n in range(count)
                ]
                peak, traffic = traced_step(engine, optimizer, batches, config, memory=memory)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        allocated = allocated_peak(json.loads(path.read_text()), "both steps")
    return tuple(peak), dict(traffic.calls), dict(traffic.payload_bytes), allocated


def allocated_peak(trace: Mapping[str, Any], within: str) -> int:
    """The most bytes that the CPU allocator had given out while the named range was open.

    Left out is what gloo takes for copies of its own, inside its calls and in its threads; NCCL makes none.
    """
    (span,) = (e for e in trace["traceEvents"] if e.get("name") == within and e.get("ph") == "X")
    calls = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e["name"].startswith("c10d::")]
    starts, ends = (sorted(e["ts"] + at * e["dur"] for e in calls if e["tid"] == span["tid"]) for at in (0, 1))
    events = [e for e in trace["traceEvents"] if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    alive: dict[int, int] = {}
    now, peak = 0, 0
    for event in sorted(events, key=lambda e: e["ts"]):
        size, address, when = event["args"]["Bytes"], event["args"]["Addr"], event["ts"]
        in_gloo = event["tid"] != span["tid"] or bisect_right(starts, when) > bisect_left(ends, when)
        if size < 0:
            now -= alive.pop(address, 0)
        elif not in_gloo:
            alive[address] = size
            now += size
        if span["ts"] <= when <= span["ts"] + span["dur"]:
            peak = max(peak, now)
    return peak
