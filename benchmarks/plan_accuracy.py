"""How near the planner comes to published figures: the tables of docs/numbers.md, made again.

python -m minka.benchmarks.plan_accuracy            print them
python -m minka.benchmarks.plan_accuracy --write    and put them into docs/numbers.md
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

from minka.benchmarks.memory_layouts import drawn
from minka.benchmarks.published_steps import Published, h100, megatron_steps, mpt_steps, rows_of
from minka.plan.calibrate import calibrate, errors
from minka.plan.cluster import find_cluster
from minka.plan.errors import UserError
from minka.plan.layout_search import search
from minka.plan.load_config import load_run
from minka.plan.memory import peak_or_more, predict_memory
from minka.plan.memory_kinds import MEMORY_KINDS
from minka.plan.time_plan import cluster_for, time_plan
from minka.train.dry_run import dry_run

PAGE = Path(__file__).resolve().parent.parent / "docs/numbers.md"
BEGIN, END = "<!-- plan accuracy: made by benchmarks/plan_accuracy.py -->", "<!-- end of plan accuracy -->"
MEMORY_BEGIN, MEMORY_END = "<!-- memory: made with --memory -->", "<!-- end of memory -->"
GIB = 2**30


def mean(values: Sequence[float]) -> float:
    """Return the mean size of errors."""
    return sum(map(abs, values)) / len(values)


def left_out(steps: Sequence[Published], group: Callable[[Published], object]) -> tuple[float, float]:
    """Return the mean error where each group is predicted by the others: ours, and that of a constant MFU."""
    ours, constant = [], []
    for value in sorted({group(one) for one in steps}, key=str):
        train = [one for one in steps if group(one) != value]
        test = [one for one in steps if group(one) == value]
        cluster = calibrate(h100("fa1"), [one.step for one in train], "the others")
        ours += errors(cluster, [one.step for one in test])
        middle = statistics.median(one.mfu for one in train)
        constant += [one.mfu / middle - 1 for one in test]
    return mean(ours), mean(constant)


def mpt_rows() -> Iterator[str]:
    """Yield the table of llm-foundry's steps."""
    steps = list(mpt_steps())
    yield f"llm-foundry, {len(steps)} steps of MPT 760M to 70B on 8 to 64 H100, mean error of the time:"
    yield ""
    yield "| rates | planner | a constant MFU |"
    yield "|---|---|---|"
    middle = statistics.median(one.mfu for one in steps)
    tabulated = mean(errors(h100("fa1"), [one.step for one in steps]))
    fitted = calibrate(h100("fa1"), [one.step for one in steps], "all")
    constant = mean([one.mfu / middle - 1 for one in steps])
    yield f"| tabulated | {tabulated:.1%} | |"
    yield f"| fitted to all | {mean(errors(fitted, [one.step for one in steps])):.1%} | {constant:.1%} |"
    for name, group in (("each size", lambda one: one.model), ("each number of GPUs", lambda one: one.gpus)):
        ours, constant = left_out(steps, group)
        yield f"| {name} by the others | {ours:.1%} | {constant:.1%} |"


def megatron_rows() -> Iterator[str]:
    """Yield the table of Megatron-LM's steps."""
    steps = list(megatron_steps())
    off = {}
    for chosen in combinations(range(len(steps)), 3):
        cluster = calibrate(h100("fa2"), [steps[at].step for at in chosen], "three")
        off[chosen] = mean(errors(cluster, [one.step for at, one in enumerate(steps) if at not in chosen]))
    ends = (0, len(steps) // 2, len(steps) - 1)
    tabulated = mean(errors(h100("fa2"), [one.step for one in steps]))
    yield f"Megatron-LM, {len(steps)} models of 1.7B to 462B on 48 to 6,144 H100, mean error of the other six:"
    yield ""
    yield "| rates | planner |"
    yield "|---|---|"
    yield f"| tabulated, all nine | {tabulated:.1%} |"
    yield f"| fitted to {', '.join(steps[at].model for at in ends)} | {off[ends]:.1%} |"
    yield f"| fitted to any three, mean of {len(off)} choices | {mean(list(off.values())):.1%} |"
    yield f"| fitted to any three, the worst choice | {max(off.values()):.1%} |"


def torchtitan_rows() -> Iterator[str]:
    """Yield torchtitan's runs next to what minka's would need; nothing is fitted to them."""
    yield "torchtitan, Llama 3 8B, 8,192 tokens, next to a run of minka with the same layout (not fitted, other code):"
    yield ""
    yield "| ranks | compiled | reserved there | planned here | tokens/s/GPU there | planned here |"
    yield "|---|---|---|---|---|---|"
    for row in rows_of("torchtitan_h100_bf16.csv"):
        ranks = int(row["ranks"])
        tokens = ranks * int(row["micro_batch"]) * int(row["seq_len"])
        overrides = [f"layout.micro_batch={row['micro_batch']}", f"layout.recompute={row['recompute']}"]
        overrides += [f"data.batch_tokens={tokens}", f"kernels.compile={row['compile']}"]
        config = load_run(row["model"], overrides).config
        planned, size = time_plan(config, ranks, cluster_for("H100-SXM")), predict_memory(config, ranks)[0].total / GIB
        speed = planned["tokens_per_second_per_gpu"]
        there = f"{row['memory_gib']} GiB | {size:.1f} GiB | {int(row['tokens_per_second_per_gpu']):,} | {speed:,.0f}"
        yield f"| {ranks} | {'yes' if row['compile'] == 'true' else 'no'} | {there} |"


def korthikanti_rows() -> Iterator[str]:
    """Yield the published activations next to the paper's terms times the layers that a first stage keeps."""
    yield "Activations of the models of arXiv:2205.05198, by its terms and the layers that a first stage keeps at once:"
    yield ""
    yield "| model | without | error | sequence parallel, selective | error |"
    yield "|---|---|---|---|---|"
    for row in rows_of("korthikanti_activations.csv"):
        layers, d, heads, t, p, v, b = (
            int(row[key])
            for key in ("layers", "d_model", "heads", "tensor", "pipeline", "stages_per_rank", "micro_batch")
        )
        kept = layers * (1 + (p - 1) / (p * v) if v > 1 else 1)
        size = 2048 * b * d / GIB * kept
        whole, selective = size * (10 + 24 / t + 5 * heads * 2048 / (d * t)), size * 34 / t
        published = float(row["none_gib"]), float(row["sequence_selective_gib"])
        off = whole / published[0] - 1, selective / published[1] - 1
        yield f"| {row['model']} | {whole:.2f} GiB | {off[0]:+.1%} | {selective:.2f} GiB | {off[1]:+.1%} |"


def layout_rows() -> Iterator[str]:
    """Yield what a search for the largest recipe finds, and where Llama 3's own layout is in it."""
    config, cluster, world = load_run("llama3-405b").config, find_cluster("H100-SXM"), 16_384
    began = time.perf_counter()
    found = search(config, world, cluster, 1, peak_or_more)
    seconds = time.perf_counter() - began
    print(f"searched in {seconds:.1f} s", file=sys.stderr)
    best = found.found[0]
    how = f"{best.layout.schedule}, {best.layout.stages_per_rank or 1} stages a rank, {best.time.seconds:.2f} s a step"
    yield f"llama3-405b on {world:,} H100, {found.searched:,} layouts; the fastest that fits:"
    yield f"{best.layout.describe()}, {how}."


def memory_rows(count: int) -> Iterator[str]:
    """Yield how far predicted memory is from dry runs of as many layouts without a pipeline, and with one."""
    yield "Memory, layouts drawn at random of dense-125m, dense-1b and llama3-8b with few layers, against dry runs:"
    yield ""
    yield "| layouts | ranks | mean error | from | to | most in one kind, of the peak |"
    yield "|---|---|---|---|---|---|"
    for pipeline, name in ((False, "without a pipeline"), (True, "in a pipeline")):
        off, kinds = [], [0.0]
        for seed in range(count):
            recipe, overrides, world = drawn(seed, pipeline=pipeline)
            config = load_run(recipe, overrides).config
            found = predict_memory(config, world)
            for one in (found[at] for at in sorted({0, len(found) // 2, len(found) - 1})):
                traced = dry_run(config, world, one.rank).memory
                off.append(one.total / traced.total - 1)
                kinds += [abs(one.by_kind[kind] - traced.by_kind[kind]) / traced.total for kind in MEMORY_KINDS]
            print(f"{name}: {seed + 1} of {count}, {off[-1]:+.2%}", file=sys.stderr, flush=True)
        shown = f"{mean(off):.2%} | {min(off):+.2%} | {max(off):+.2%} | {max(kinds):.1%}"
        yield f"| {count} {name} | {len(off)} | {shown} |"


TABLES = (mpt_rows, megatron_rows, torchtitan_rows, korthikanti_rows, layout_rows)


def section() -> str:
    """Return the tables as the page has them."""
    return "\n\n".join("\n".join(table()) for table in TABLES)


def main() -> int:
    """Print the tables; with --write, put them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put them into {PAGE.name}")
    parser.add_argument("--memory", type=int, default=0, metavar="N", help="trace so many layouts of each kind")
    options = parser.parse_args()
    begin, end = (MEMORY_BEGIN, MEMORY_END) if options.memory else (BEGIN, END)
    try:
        text = "\n".join(memory_rows(options.memory)) if options.memory else section()
    except UserError as error:
        print(f"plan_accuracy: {error}", file=sys.stderr)
        return 2
    print(text)
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(begin)
        PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
