"""The search for a layout: as good as trying all, fast, and with reasons."""

import json
import shlex
import time
from collections.abc import Iterator
from math import inf

import pytest

from minka.__main__ import main
from minka.plan.cluster import Cluster, find_cluster
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.layout import Layout
from minka.plan.layout_candidates import Candidate, Candidates, Cut
from minka.plan.layout_plan import layout_plan
from minka.plan.layout_search import MARGIN, search
from minka.plan.load_config import load_run
from minka.plan.memory import peak_or_more
from minka.plan.run_job import job_of
from minka.plan.step_time import step_time

H100 = find_cluster("H100-SXM")


def every(config: RunConfig, world: int, cluster: Cluster) -> Iterator[tuple[float, int, Candidate]]:
    """(seconds, peak, candidate) of every legal layout, predicted one by one."""
    for candidate in Candidates(config, world, cluster, inf):
        layout = candidate.layout(config.layout)
        seconds = step_time(job_of(config, layout, cluster), cluster).seconds
        yield seconds, peak_or_more(config.model_copy(update={"layout": layout}), world, inf), candidate


@pytest.mark.parametrize(
    ("run", "world", "overrides"),
    [
        ("dense-1b", 4, ["data.batch_tokens=131072"]),
        ("llama3-8b", 8, ["data.batch_tokens=131072", "model.layers=8", "kernels.compile=false"]),
        pytest.param(*("llama3-8b", 16, ["data.batch_tokens=262144"]), marks=pytest.mark.slow),
    ],
)
def test_nothing_that_fits_is_faster(run: str, world: int, overrides: list[str]) -> None:
    """And no bound is above what it bounds."""
    config = load_run(run, ["data.batch_warmup=[]", "schedule.warmup=0", *overrides]).config
    room = (1 - MARGIN) * H100.memory_bytes
    tried = list(every(config, world, H100))
    for seconds, _, candidate in tried:
        assert candidate.seconds <= seconds * (1 + 1e-9), candidate
    best = min(seconds for seconds, size, _ in tried if size <= room)
    found = search(config, world, H100, 1, peak_or_more)
    assert found.found[0].time.seconds == pytest.approx(best)
    assert found.searched > 0


def test_a_layout_that_memory_prunes_does_not_fit() -> None:
    """The bound on memory is one: what it leaves out is above the room."""
    config = load_run("llama3-8b", ["data.batch_tokens=262144", "data.batch_warmup=[]", "schedule.warmup=0"]).config
    room = 30e9
    kept = {(one.cut, one.way) for one in Candidates(config, 8, H100, room)}
    for _, size, candidate in every(config, 8, H100):
        if (candidate.cut, candidate.way) not in kept:
            assert size > room, candidate


def test_the_largest_recipe_is_searched_in_ten_seconds_and_llama_3s_own_layout_is_near() -> None:
    """Tensor 8, pipeline 16, data 128 (arXiv:2407.21783, table 4) fits 80 GB and is within 10 % of the fastest."""
    config = load_run("llama3-405b").config
    began = time.process_time()
    found = search(config, 16_384, H100, 1, peak_or_more)
    took = time.process_time() - began
    print(f"{found.searched:,} layouts in {took:.1f} s: {found.found[0].layout.describe()}")
    assert took < 10
    room, config = (1 - MARGIN) * H100.memory_bytes, config.after_warmup()
    theirs = []
    for candidate in Candidates(config, 16_384, H100, room):
        cut = candidate.cut
        if (cut.tensor, cut.pipeline, cut.context, cut.replicate * cut.shard) == (8, 16, 1, 128):
            layout = candidate.layout(config.layout)
            seconds = step_time(job_of(config, layout, H100), H100).seconds
            if seconds <= 1.1 * found.found[0].time.seconds:
                theirs.append((seconds, layout))
    sizes = []
    for seconds, layout in sorted(theirs, key=lambda one: one[0]):
        sizes.append(peak_or_more(config.model_copy(update={"layout": layout}), 16_384, room))
        if sizes[-1] <= room:
            print(f"theirs: {seconds / found.found[0].time.seconds - 1:+.1%}, {sizes[-1] / 1e9:.1f} GB")
            break
    assert min(sizes) <= room


@pytest.mark.parametrize(("run", "world"), [("llama3-70b", 256), ("llama3-8b", 1024)])
def test_a_search_does_not_give_up(run: str, world: int) -> None:
    """Steps of many micro-batches need a buffer for each: a bound without them tries thousands in vain."""
    found = search(load_run(run).config, world, H100, 5, peak_or_more)
    assert len(found.found) == 5
    assert not any(reason.startswith("not looked at") for reason in found.pruned)


def test_the_answer_says_why_and_what_to_measure() -> None:
    found = layout_plan("llama3-8b", [], 64, "H100-SXM")
    times = [one["step_seconds"] for one in found["layouts"]]
    assert times == sorted(times)
    assert len(times) == 5
    assert found["searched"] > 1000
    assert found["pruned"]["memory"] > 0
    assert "saves" in found["why"]
    names = set()
    for command in found["benchmark"]:
        _, _, run, *words = shlex.split(command)
        benchmark = load_run(run, words).config
        assert benchmark.total_steps == 20
        names.add(benchmark.run.name)
    assert len(names) == len(found["benchmark"]) > 1
    changed = {key for row in found["neighbours"] for key in row["change"]}
    assert {"tensor", "context", "pipeline", "replicate", "micro_batch", "recompute", "reshard", "reduce"} <= changed
    best = found["layouts"][0]
    for row in found["neighbours"]:
        if row["fits"]:
            assert row["step_seconds"] >= best["step_seconds"] * (1 - 1e-9), row


def test_the_overrides_of_an_answer_are_a_run() -> None:
    found = layout_plan("llama3-70b", [], 256, "H100-SXM", top=2)
    for one in found["layouts"]:
        layout = load_run("llama3-70b", [*one["overrides"], "data.batch_warmup=[]"]).config.check(256)
        assert layout == Layout.model_validate(one["layout"])


@pytest.mark.parametrize(("run", "world"), [("demo", 7), ("demo", 1000), ("llama3-8b", 1009)])
def test_a_number_of_ranks_that_leaves_padding_has_layouts(run: str, world: int) -> None:
    assert layout_plan(run, [], world, "H100-SXM", top=1)["layouts"]


def test_a_run_with_its_own_stages_gets_overrides_that_replace_them() -> None:
    own = ["layout.pipeline=4", "layout.stages=20,20,20,20", "data.batch_warmup=[]"]
    found = layout_plan("llama3-70b", own, 256, "H100-SXM", top=2)
    for one in found["layouts"]:
        config = load_run("llama3-70b", [*own, *one["overrides"]]).config
        assert config.check(256) == Layout.model_validate(one["layout"])


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_the_layout_that_needs_least_is_not_pruned_where_it_just_fits(stored: str) -> None:
    """The tightest room there is: a bound above what it bounds, such as fp32 state taken for bf16's, loses it."""
    overrides = [f"optimizer.weights={stored}", f"optimizer.moments={stored}", "data.batch_tokens=32768"]
    config = load_run("llama3-8b", ["model.layers=24", "data.batch_warmup=[]", "schedule.warmup=0", *overrides]).config
    size, best = min((size, candidate[1:]) for _, size, candidate in every(config, 4, H100))
    assert best in {candidate[1:] for candidate in Candidates(config, 4, H100, size)}


def test_deepspeed_is_refused() -> None:
    with pytest.raises(UserError, match="FSDP"):
        layout_plan("demo", ["layout.engine=deepspeed"], 4, "H100-SXM")


def test_without_nvlink_no_tensor_group_is_proposed() -> None:
    """Training refuses one (plan/topology.py)."""
    config = load_run("llama3-8b", ["data.batch_warmup=[]"]).config
    assert {one.cut.tensor for one in Candidates(config, 8, find_cluster("L40S"), inf)} == {1}
    assert {one.cut.tensor for one in Candidates(config, 8, H100, inf)} == {1, 2, 4, 8}


def test_what_fits_nowhere_is_refused_with_what_would_work() -> None:
    with pytest.raises(UserError) as refusal:
        layout_plan("llama3-405b", [], 8, "H100-SXM")
    assert "--world" in refusal.value.remedy


def test_a_cut_is_in_the_order_of_the_mesh() -> None:
    assert Cut._fields == ("pipeline", "replicate", "shard", "context", "tensor")


def test_what_an_override_decides_is_not_searched(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layout.tensor=4", "layout.recompute=block", "--world", "16", "--gpu", "H100-SXM"]
    assert main(["plan", "layout", "llama3-8b", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pinned"] == {"tensor": 4, "recompute": "block"}
    assert {(one["layout"]["tensor"], one["layout"]["recompute"]) for one in found["layouts"]} == {(4, "block")}
    assert main(["plan", "layout", "llama3-8b", "layout.tensor=3", "--world", "16", "--gpu", "H100-SXM"]) == 2
    assert "tensor=3 does not divide" in capsys.readouterr().err


def test_a_decided_micro_batch_need_not_be_a_power_of_two(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layout.micro_batch=3", "data.batch_tokens=786432", "--world", "16", "--gpu", "H100-SXM"]
    assert main(["plan", "layout", "llama3-8b", *words, "--json"]) == 0
    assert {one["layout"]["micro_batch"] for one in json.loads(capsys.readouterr().out)["layouts"]} == {3}


def test_a_neighbour_keeps_replicas_where_there_are_no_shards(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layout.shard=1", "layout.tensor=1", "--world", "8", "--gpu", "H200-SXM"]
    assert main(["plan", "layout", "dense-125m", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["layouts"][0]["layout"]
    assert (best["replicate"], best["shard"]) == (8, 1)
    costs = {tuple(row["change"].items()): row for row in found["neighbours"]}
    there = load_run("dense-125m", ["layout.replicate=4", "layout.tensor=2", "layout.shard=1", "data.batch_warmup=[]"])
    layout = there.config.layout.model_copy(update={"micro_batch": best["micro_batch"], "recompute": best["recompute"]})
    config = there.config.model_copy(update={"layout": layout})
    seconds = step_time(job_of(config, config.check(8), find_cluster("H200-SXM")), find_cluster("H200-SXM")).seconds
    assert costs[(("tensor", 2),)]["step_seconds"] == pytest.approx(seconds)
