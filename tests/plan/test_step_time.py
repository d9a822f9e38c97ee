"""Step times: what must hold for any run, and the sums they are made of."""

from dataclasses import replace

import pytest

from minka.plan.cluster import Cluster, find_cluster
from minka.plan.collective_time import Group, passes_seconds
from minka.plan.errors import UserError
from minka.plan.flops import Shape, training_flops_per_token
from minka.plan.layout import Layout
from minka.plan.load_config import load_run
from minka.plan.pipeline_passes import _gathers, gathers_of_stage
from minka.plan.rates import Rates
from minka.plan.run_job import job_of
from minka.plan.step_time import KINDS, StepTime, step_time
from minka.plan.step_work import Part, block_backward, block_forward, head_work
from minka.plan.time_plan import time_plan

H100 = find_cluster("H100-SXM")
IDEAL = Rates(matrix=1, attention=1, memory=1e9, link=1e9, network=1e9, exposed=0, layer_seconds=0, message_seconds=0)


def step(run: str = "llama3-8b", world: int = 8, cluster: Cluster = H100, *overrides: str) -> StepTime:
    config = load_run(run, ["data.batch_warmup=[]", *overrides]).config
    return step_time(job_of(config, config.check(world), cluster), cluster)


def test_an_ideal_machine_takes_the_flops_and_nothing_else() -> None:
    """Counted forward and backward, attention's backward with the product that flash attention repeats."""
    config = load_run("llama3-8b", ["layout.recompute=none", "data.batch_warmup=[]"]).config
    found = step("llama3-8b", 8, replace(H100, rates=IDEAL), "layout.recompute=none")
    flops = training_flops_per_token(config.model, config.data.seq_len)
    attention = 3 * config.model.layers * 2 * config.data.seq_len * config.model.heads * config.model.head_dim
    counted = config.data.batch_tokens / 8 * (flops + attention * (3.5 / 3 - 1)) / H100.peak_flops
    assert found.seconds == pytest.approx(counted, rel=1e-6)


def test_counts_of_a_block_and_the_head_are_those_of_the_model() -> None:
    shape = Shape(layers=3, d_model=64, heads=4, kv_heads=2, head_dim=16, d_ff=96, vocab=256)
    part = Part(shape, 128)
    blocks = block_forward(part).plus(block_backward(part))
    matrices = 3 * blocks.matrix_flops + head_work(part).matrix_flops
    no_attention = training_flops_per_token(shape, 0)
    assert matrices == pytest.approx(128 * no_attention)


@pytest.mark.parametrize("axis", ["tensor", "context", "pipeline", "replicate"])
def test_the_parts_of_a_step_are_its_time_and_none_is_negative(axis: str) -> None:
    found = step("llama3-8b", 16, H100, f"layout.{axis}=2")
    assert set(found.breakdown) == set(KINDS)
    assert found.seconds == pytest.approx(sum(found.breakdown.values()))
    assert min(found.breakdown.values()) >= 0
    waits = "bubble" if axis == "pipeline" else axis
    assert found.breakdown[waits] > 0


@pytest.mark.parametrize("rate", ["matrix", "attention", "memory", "link", "network"])
def test_a_faster_machine_is_never_slower(rate: str) -> None:
    faster = replace(H100, rates=replace(H100.rates, **{rate: getattr(H100.rates, rate) * 1.3}))
    for overrides in ((), ("layout.tensor=4",), ("layout.context=2",), ("layout.pipeline=2",)):
        assert step("llama3-8b", 32, faster, *overrides).seconds <= step("llama3-8b", 32, H100, *overrides).seconds


def test_more_gpus_shorten_a_step_and_longer_sequences_lengthen_it() -> None:
    times = [step("llama3-8b", world).seconds for world in (8, 16, 64, 256)]
    assert times == sorted(times, reverse=True)
    lengths = []
    for length in (1024, 2048, 8192):  # as many tokens in a micro-batch
        overrides = (f"data.seq_len={length}", f"layout.micro_batch={8192 // length}")
        lengths.append(step("llama3-8b", 8, H100, *overrides).seconds)
    assert lengths == sorted(lengths)


def test_the_same_question_has_the_same_answer() -> None:
    config = load_run("llama3-70b").config
    assert time_plan(config, 256, H100, 2.0) == time_plan(config, 256, H100, 2.0)


def test_a_ring_within_a_host_is_limited_by_links_and_one_across_by_networks() -> None:
    free = replace(H100, rates=replace(IDEAL, link=1.0, network=1.0))
    inside = passes_seconds(free, Group(8, 1), 8e9, 1)
    assert inside == pytest.approx(7e9 / 450e9)
    across = passes_seconds(free, Group(8, 8), 8e9, 1)  # a GPU of each of eight hosts: its own network port
    assert across == pytest.approx(7e9 / 50e9)
    both = passes_seconds(free, Group(16, 1), 16e9, 1)  # two whole hosts: eight ports carry half of it
    assert both == pytest.approx(max(15e9 / 450e9, 8e9 / (8 * 50e9)))
    assert passes_seconds(free, Group(1, 1), 8e9, 1) == 0


def test_groups_are_those_of_the_mesh() -> None:
    layout = Layout(pipeline=2, replicate=3, shard=5, context=7, tensor=11)
    assert Group.of(layout, "tensor") == (11, 1)
    assert Group.of(layout, "context") == (7, 11)
    assert Group.of(layout, "shard", "context") == (35, 11)
    assert Group.of(layout, "replicate") == (3, 385)
    assert Group.of(layout, "pipeline") == (2, 1155)


def test_a_machine_without_a_network_is_refused_where_one_is_needed() -> None:
    lonely = find_cluster("L4")
    assert step("dense-125m", 8, lonely).seconds > 0
    with pytest.raises(UserError, match="network_gb"):
        step("dense-125m", 16, lonely)


@pytest.mark.parametrize(
    ("run", "overrides", "world", "said"),
    [
        ("llama3-8b", ["layout.engine=deepspeed", "kernels.compile=false"], 8, "is not predicted"),
        ("llama3-8b", ["layout.offload=all"], 8, "is not predicted"),
        ("llama3-8b", ["layout.tensor=3"], 8, "layout"),
        ("llama3-8b", ["layout.shard=3"], 8, "needs 3 ranks"),
        ("llama3-8b", ["data.seq_len=16384"], 8, "max_positions"),
    ],
)
def test_what_cannot_be_timed_is_refused(run: str, overrides: list[str], world: int, said: str) -> None:
    with pytest.raises(UserError) as refusal:
        time_plan(load_run(run, overrides).config, world, H100)
    assert said in str(refusal.value)
    assert refusal.value.remedy


def test_weights_are_freed_where_training_frees_them() -> None:
    """By the size of the model's weights, whatever a tensor group leaves of them on a rank."""
    config = load_run("llama3-8b", ["layout.tensor=8", "data.batch_warmup=[]"]).config
    always = load_run("llama3-8b", ["layout.tensor=8", "layout.reshard=always", "data.batch_warmup=[]"]).config
    assert job_of(config, config.check(64), H100).freed
    assert time_plan(config, 64, H100)["step_seconds"] == time_plan(always, 64, H100)["step_seconds"]


def test_many_stages_of_a_rank_are_gathered_again() -> None:
    once = gathers_of_stage(Layout(pipeline=4, shard=2, schedule="interleaved", stages_per_rank=3), 16)
    again = gathers_of_stage(Layout(pipeline=4, shard=2, schedule="interleaved", stages_per_rank=4), 16)
    assert once == 1
    assert again == 3.75
    layout = Layout(pipeline=4, shard=2, schedule="interleaved", stages_per_rank=8)
    assert gathers_of_stage(layout, 64) == pytest.approx(_gathers(layout, 64))


def test_days_count_the_warm_up_and_dollars_the_hours() -> None:
    config = load_run("llama3-405b").config
    found = time_plan(config, 16_384, H100, 2.0)
    hours = found["days"] * 24 * 16_384
    assert found["gpu_hours"] == pytest.approx(hours)
    assert found["dollars"] == pytest.approx(2 * hours)
    steps_alone = found["steps"] * found["step_seconds"] / 86_400
    assert 0.5 * steps_alone < found["days"] < steps_alone * 1.01  # smaller batches at the beginning are faster
