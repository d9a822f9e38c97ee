"""`make bench-kernels`: every operation by torch, by torch.compile and by Triton, in one run, against what is possible.

The ceilings are measured in the same run: a large copy, and a large product of matrices. Implementations take turns,
buffers rotate so that none is still in the cache, and a time is the median of many.
"""

import argparse
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minka.benchmarks.kernel_cases import KernelCase, kernel_cases
from minka.benchmarks.options import require_gpu, require_one
from minka.benchmarks.step_rows import name_of
from minka.kernels.choose import (
    CHOICES,
    Machine,
    Work,
    cannot_attend,
    cannot_run,
    read_choices,
    torch_version,
)
from minka.plan.cli import print_json, print_table
from minka.plan.read_file import first_line

CACHE_BYTES = 128 * 2**20  # more than twice the second-level cache of any GPU here
WARM_SECONDS, REPETITIONS = 0.025, 50
HEAD = ("operation", "width", "pass", "way", "ms", "rate", "of the ceiling", "peak MiB")
FIRST_LINES = """\
# Measured times by GPU, torch, operation and width of its rows; `kernels.implementation = "auto"` reads them.
# `make bench-kernels` writes them. No row for a GPU: torch's own operations run there.
"""

PAGE = Path(__file__).resolve().parent.parent / "docs/kernels.md"
BEGIN, END = "<!-- measured -->", "<!-- end -->"

Timing = dict[str, Any]  # of one case, pass and way


def main() -> int:
    """Time the operations whose name contains --only; --write keeps what was measured for `auto` to read."""
    parser = argparse.ArgumentParser(description="Times of every operation, against the machine's own limits.")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further operation after so long")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--write", action="store_true", help=f"write the winners to {CHOICES.name}; needs a GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    require_gpu(parser, tiny=options.tiny)
    if options.write and options.tiny:
        parser.error("--write needs a GPU, and sizes that are not tiny")
    cases = in_turns(kernel_cases("tiny" if options.tiny else "full"))
    require_one(parser, options.only, (case.operation for case in cases))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = measure_ceilings(device, tiny=options.tiny)
    timings, failed, left_out = list[Timing](), list[Timing](), list[str]()
    end = time.monotonic() + options.seconds
    for case in cases:
        if options.only not in case.operation:
            continue
        if time.monotonic() > end:
            left_out.append(f"{case.operation} {case.width} {case.note}".strip())
        else:
            print(f"{case.operation} {case.width} {case.note}", file=sys.stderr, flush=True)
            found = list(time_case(case, device, ceilings, tiny=options.tiny))
            failed += [one for one in found if "failed" in one]
            timings += [one for one in found if "failed" not in one]
            if options.write:
                _keep(timings, device)
    if left_out:
        print(f"no time was left for {'; '.join(left_out)}", file=sys.stderr)
    if options.json:
        about = {"gpu": name_of(device), "torch": torch_version(), "ceilings": ceilings, "left_out": left_out}
        print_json({**about, "timings": timings, "failed": failed})
    else:
        print_table([_row(timing) for timing in timings], HEAD, title=f"{name_of(device)}, torch {torch_version()}")
    for one in failed:
        what = f"{one['way']}'s {one['operation']} {one['width']} {one['note']}, {one['pass']}"
        print(f"failed: {what}: {one['failed']}", file=sys.stderr)
    return 1 if any(one["way"] == "triton" for one in failed) else 0  # a peer's failure says nothing of us


def _keep(timings: Sequence[Timing], device: torch.device) -> None:
    """Write what was measured so far: the rest may be cut off."""
    CHOICES.write_text(choices_text(merged(timings, name_of(device))), encoding="utf-8")
    read_choices.cache_clear()
    PAGE.write_text(page_text(PAGE.read_text(encoding="utf-8"), read_choices()), encoding="utf-8")


def in_turns(cases: Iterable[KernelCase]) -> list[KernelCase]:
    """The first case of every operation, then the second of each: where time is short, all have some."""
    seen, turns = Counter[str](), list[tuple[int, KernelCase]]()
    for case in cases:
        turns.append((seen[case.operation], case))
        seen[case.operation] += 1
    return [case for _, case in sorted(turns, key=lambda turn: turn[0])]


def measure_ceilings(device: torch.device, *, tiny: bool) -> dict[str, float]:
    """Bytes a second of a copy (read and written), and FLOP/s of a product, both large."""
    size = 2**10 if tiny else 2**29
    source = torch.randn(size, device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, tiny=tiny)
    side = 32 if tiny else 8192
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    return {"bytes_per_s": copied, "flop_per_s": 2 * side**3 / median_seconds(lambda: a @ b, device, tiny=tiny)}


def time_case(case: KernelCase, device: torch.device, ceilings: Mapping[str, float], *, tiny: bool) -> Iterator[Timing]:
    """A row for each pass and way; ways that cannot run here are left out."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    work = Work(dtype, {case.operation: case.width})
    ways = {name: way for name, way in case.ways.items() if not _obstacle(case.operation, name, device, work)}
    if case.compiles and not tiny:
        ways["compile"] = torch.compile(case.ways["torch"], dynamic=False)
    for index, name in enumerate(("forward", "backward") if case.learned else ("forward",)):
        bound = max(case.moved[index] / ceilings["bytes_per_s"], case.flops[index] / ceilings["flop_per_s"])
        for way, function in ways.items():
            inputs = _rotating(case, device, dtype, tiny=tiny)
            try:
                call = _forward(function, inputs) if name == "forward" else _backward(case, function, inputs)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                seconds = median_seconds(call, device, tiny=tiny)
            except Exception as error:  # what was measured of the others must not be lost
                yield {"operation": case.operation, "width": case.width, "note": case.note, "pass": name, "way": way,
                       "failed": f"{type(error).__name__}: {first_line(error)}"}  # fmt: skip
                continue
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            yield {
                "operation": case.operation,
                "width": case.width,
                "note": case.note,
                "pass": name,
                "way": way,
                "ms": 1e3 * seconds,
                "bytes_per_s": case.moved[index] / seconds,
                "flop_per_s": case.flops[index] / seconds,
                "share": bound / seconds,
                "peak_bytes": peak,
            }


def _obstacle(operation: str, way: str, device: torch.device, work: Work) -> str:
    if way == "torch":
        return ""
    if way == "triton":
        return cannot_run(operation, Machine.of(device), work)
    if way == "liger":
        return "" if device.type == "cuda" else "there is no GPU"
    return cannot_attend(way, Machine.of(device), work)


def _rotating(case: KernelCase, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> list[tuple[Tensor, ...]]:
    """Sets of inputs that together are larger than the cache."""
    one = case.make(device, dtype)
    size = sum(tensor.nbytes for tensor in one)
    return [one, *(case.make(device, dtype) for _ in range(1 if tiny else CACHE_BYTES // size + 1))]


def _forward(function: Callable[..., Any], inputs: Sequence[tuple[Tensor, ...]]) -> Callable[[], object]:
    turns = cycle(inputs)

    def call() -> object:
        with torch.no_grad():
            return function(*next(turns))

    return call


def _backward(
    case: KernelCase, function: Callable[..., Any], inputs: Sequence[tuple[Tensor, ...]]
) -> Callable[[], object]:
    """Backward alone, of graphs that are kept."""
    graphs = []
    for tensors in inputs:
        learned = [tensor.detach().requires_grad_() for tensor in tensors[: case.learned]]
        outputs = function(*learned, *tensors[case.learned :])
        graphs.append((outputs, learned, [torch.randn_like(output) for output in outputs]))
    turns = cycle(graphs)

    def call() -> object:
        outputs, learned, gradients = next(turns)
        return torch.autograd.grad(outputs, learned, gradients, retain_graph=True)

    return call


def median_seconds(call: Callable[[], object], device: torch.device, *, tiny: bool) -> float:
    """Of one call, after warming up."""
    if device.type != "cuda":
        call()
        return statistics.median(_clocked(call) for _ in range(2 if tiny else REPETITIONS))
    until = time.perf_counter() + (0.0 if tiny else WARM_SECONDS)
    call()
    while time.perf_counter() < until:
        call()
        torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(2 if tiny else REPETITIONS)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def _clocked(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _row(timing: Timing) -> tuple[str, ...]:
    kind, unit = ("flop_per_s", "TFLOP/s") if timing["flop_per_s"] else ("bytes_per_s", "TB/s")
    rate = f"{timing[kind] / 1e12:.4g} {unit}"
    name = f"{timing['operation']} {timing['note']}".strip()
    numbers = f"{timing['ms']:.4g}", rate, f"{timing['share']:.0%}", f"{timing['peak_bytes'] / 2**20:,.0f}"
    return name, str(timing["width"]), timing["pass"], timing["way"], *numbers


def merged(timings: Sequence[Timing], gpu: str) -> list[dict[str, Any]]:
    """Rows of choices.toml: both passes of each way together; the first case of an operation and width decides.

    A way that lacks a pass which another one has is left out: it failed there, and training needs both.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    notes: dict[tuple[str, int], str] = {}
    for timing in timings:
        key = timing["operation"], timing["width"]
        if notes.setdefault(key, timing["note"]) != timing["note"]:
            continue
        mine = [t for t in timings if (t["operation"], t["width"], t["note"]) == (*key, timing["note"])]
        if {t["pass"] for t in mine} > {t["pass"] for t in mine if t["way"] == timing["way"]}:
            continue
        first = {"gpu": gpu, "torch": torch_version(), "operation": key[0], "width": key[1], "date": str(date.today())}
        row = rows.setdefault(key, first)
        name = f"{timing['way']}_ms"
        row[name] = round(row.get(name, 0.0) + timing["ms"], 5)
    return list(rows.values())


def choices_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """choices.toml with these rows, and those of other GPUs and versions of torch that it has."""
    fresh = {(row["gpu"], row["torch"], row["operation"], row["width"]) for row in rows}
    kept = [r for r in read_choices() if (r["gpu"], r["torch"], r["operation"], r["width"]) not in fresh]
    lines = [FIRST_LINES]
    for row in [*kept, *rows]:
        lines.append("[[measured]]")
        lines += [f"{key} = {value!r}".replace("'", '"') for key, value in row.items()]
        lines.append("")
    return "\n".join(lines)


def page_text(page: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page of the kernels with the table of these rows."""
    head, rest = page.split(BEGIN)
    columns = ("gpu", "torch", "date", "operation", "width")
    ways = sorted({key for row in rows for key in row if key.endswith("_ms")})
    lines = [f"| {' | '.join((*columns, *ways))} |", f"|{'---|' * (len(columns) + len(ways))}"]
    lines += [f"| {' | '.join(str(row.get(key, '')) for key in (*columns, *ways))} |" for row in rows]
    table = "\n".join(lines) if rows else "Nothing yet: no GPU has run them."
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    sys.exit(main())
