"""`minka plan ladder`: the cheapest small runs that tell the best size of a large one, their files and their script."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from minka.plan.atomic import write_text, writing
from minka.plan.budget_plan import Wishes, budget_plan, short
from minka.plan.compute_budget import BudgetAsked, BudgetMachine, Goal
from minka.plan.config_sections import ModelSection
from minka.plan.emit_run import data_section, run_of
from minka.plan.errors import UserError
from minka.plan.flops import parameters
from minka.plan.ladder_design import DECAY, MULTIPLES, cheapest_ladder, width_of_optimum
from minka.plan.law_file import law_of_name

SCRIPT = """#!/usr/bin/env bash
# Trains the ladder's runs, each size's trunk before its branches. All sizes one after the other, or one of them:
#   bash ladder.sh 0        sbatch --array=0-{last} ladder.sh
set -euo pipefail
cd {folder}
size=${{1:-${{SLURM_ARRAY_TASK_ID:-all}}}}
{functions}
if [ "$size" = all ]; then
    for one in $(seq 0 {last}); do "size_$one"; done
else
    "size_$size"
fi
"""


class LadderAsked(NamedTuple):
    """What was said: the target, how well its best size should be known, and what runs are like."""

    flops: float
    within: float = 0.5
    smallest: float = 1e7
    sizes: tuple[float, ...] = ()  # given instead of found
    law: str = "epoch"
    noise: float = 0.003
    data_of: str = ""
    vocab: int = 0
    seq_len: int = 0


def ladder_plan(asked: LadderAsked, folder: Path | None = None) -> dict[str, Any]:
    """Return what the JSON has, and write the files. Raises UserError."""
    law = law_of_name(asked.law)
    for where, value in {"--flops": asked.flops, "--within": asked.within, "--noise": asked.noise}.items():
        if not 0 < value < 1e40:
            raise UserError(f"{value:g}", where=where, remedy="give a number above 0")
    sizes: tuple[float, ...] = asked.sizes
    multiples: tuple[float, ...] = MULTIPLES[0]
    if not sizes:
        found = cheapest_ladder(law, asked.flops, asked.within, asked.smallest, asked.noise)
        sizes, multiples = found.sizes, found.multiples
    elif len(sizes) < 3 or min(sizes) <= 0:
        raise UserError("so few sizes do not fix a law", where="--sizes", remedy="give three or more, above 0")
    sizes = tuple(sorted(sizes))
    runs, files = [], dict[str, dict[str, Any]]()
    for number, size in enumerate(sizes):
        for run in _runs_of_size(number, size, multiples, asked):
            files[f"{run['run']['name']}.toml"] = run
            runs.append(_as_row(run))
    _check_shapes(sizes, [run["model"] for run in files.values() if "start_from" not in run["run"]])
    # Of the runs as they are: architectures are not exactly of the sizes that were looked for.
    width = width_of_optimum(law, asked.flops, [(run["parameters"], run["tokens"]) for run in runs], asked.noise)
    best, flops = law.optimum(asked.flops), sum(run["flops"] for run in runs)
    plan = {
        "target_flops": asked.flops,
        "target_parameters": best.parameters,
        "target_interval": [best.parameters * factor for factor in _factors(width)],
        "ladder_flops": flops,
        "ladder_share": flops / asked.flops,
        "ladder": runs,
        "law": law.name,
        "folder": str(folder) if folder else None,
    }
    if folder:
        _write(folder, files, len(sizes))
    return plan


def _check_shapes(sizes: Sequence[float], models: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError where two sizes are one architecture: small ones are far apart."""
    for number in range(len(sizes) - 1):
        if models[number] == models[number + 1]:
            what = f"{short(sizes[number])} and {short(sizes[number + 1])} weights are the same architecture"
            raise UserError(what, where="--sizes", remedy="choose sizes that are further apart, or larger ones")


def _factors(width: float) -> tuple[float, float]:
    return math.exp(-width), math.exp(width)


def _runs_of_size(number: int, size: float, multiples: Sequence[float], asked: LadderAsked) -> list[dict[str, Any]]:
    """The trunk, which ends at the largest multiple, and a branch for each other one."""
    goal, wishes = Goal(law_of_name(asked.law)), Wishes(asked.vocab, asked.seq_len)
    longest = budget_plan(BudgetAsked(parameters=size, tokens=size * max(multiples)), BudgetMachine(), goal, wishes)
    data = data_section(asked.data_of or ("demo" if size < 3e6 else "dense-125m"))
    base = run_of(longest, f"trunk-{number}", data)
    size, batch = longest["parameters"], base["data"]["batch_tokens"]  # the architecture's, from here on
    ends = {multiple: _whole(size * multiple, batch) for multiple in sorted(multiples)}
    starts = {multiple: _whole(end * (1 - DECAY), batch) for multiple, end in ends.items()}
    *early, last = ends
    warmup = base["schedule"]["warmup"] * batch

    def run(name: str, multiple: float, **of_run: Any) -> dict[str, Any]:
        schedule = {"kind": "wsd", "unit": "tokens", "warmup": warmup, "final_ratio": 0.0}
        low, high = goal.law.interval(size, ends[multiple])
        expected = {"loss": goal.law.loss(size, ends[multiple]), "loss_low": low, "loss_high": high}
        return {
            **base,
            "plan": {"law": goal.law.name, **expected},
            "run": {"name": name, "max_tokens": ends[multiple], **of_run},
            "schedule": {**schedule, "decay": ends[multiple] - starts[multiple]},
        }

    base |= {"checkpoint": {"keep": 1}, "eval": {}}  # scored at its end alone: that is what is fitted
    trunk = run(f"trunk-{number}", last)
    trunk["checkpoint"] = {"keep": 1, "keep_tokens": [starts[multiple] for multiple in early]}
    branches = [
        run(
            f"branch-{number}-{multiple:g}",
            multiple,
            start_from=f"runs/trunk-{number}@{starts[multiple] // batch}",
            start_with="all",
        )
        for multiple in early
    ]
    return [trunk, *branches]


def _whole(tokens: float, batch: int) -> int:
    return max(2, round(tokens / batch)) * batch


def _as_row(run: Mapping[str, Any]) -> dict[str, Any]:
    size, tokens = parameters(ModelSection.model_validate(run["model"])), run["run"]["max_tokens"]
    begins = int(run["run"].get("start_from", "@0").split("@")[1]) * run["data"]["batch_tokens"]
    return {
        "run": run["run"]["name"],
        "parameters": size,
        "tokens": tokens,
        "start_from": run["run"].get("start_from"),
        "flops": 6 * size * (tokens - begins),
    }


def _write(folder: Path, files: Mapping[str, Mapping[str, Any]], sizes: int) -> None:
    """The run files and `ladder.sh`. Raises UserError where the folder has files already."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError("is not empty", where=str(folder), remedy="choose a new folder")
    with writing(folder, "choose a different folder"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in files.items():
            write_text(folder / name, tomli_w.dumps(dict(values)))
        functions = []
        for number in range(sizes):
            names = [name for name in files if name.split("-")[1].removesuffix(".toml") == f"{number}"]
            lines = [f"    minka train {name}" for name in names]
            functions.append("\n".join([f"size_{number}() {{", *lines, "}"]))
        here = shlex.quote(str(folder.resolve()))
        write_text(folder / "ladder.sh", SCRIPT.format(last=sizes - 1, folder=here, functions="\n".join(functions)))


def ladder_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table for people."""
    low, high = found["target_interval"]
    rows = [
        [
            "target",
            short(found["target_parameters"]),
            f"weights at {found['target_flops']:.3g} FLOPs, by {found['law']!r}",
        ],
        ["then known", f"{short(low)} to {short(high)}", "95 %, if runs scatter as they are believed to"],
        ["cost", f"{found['ladder_flops']:.3g}", f"FLOPs, {found['ladder_share']:.1%} of the target's"],
    ]
    for run in found["ladder"]:
        begins = f"from {run['start_from']}" if run["start_from"] else ""
        rows.append([f"  {run['run']}", short(run["parameters"]), f"weights, {short(run['tokens'])} tokens {begins}"])
    if found["folder"]:
        rows.append(["written", found["folder"], f"then `bash {found['folder']}/ladder.sh` and `minka plan fit`"])
    return rows
