"""Law 2, the whole matrix: under every layout losses, gradients, weights and moments are those of one process."""

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch.distributed.fsdp import FSDPModule

from faults import DRIFT, MUTANTS
from minka.parallel.apply import build_parts
from minka.parallel.mesh import start_mesh
from minka.plan.config import RunConfig
from minka.plan.layout import STAGES_PER_RANK
from parity import BOUNDS, EXACT, Run, check, config_of, differences, rank_of, run_on
from ranks import on_ranks

SCHEDULES = sorted(STAGES_PER_RANK)
VARIANTS: dict[str, dict[str, Any]] = {"": {}, "QK-norm": {"qk_norm": True}, "QKV bias": {"qkv_bias": True}}


class Row(NamedTuple):
    """One layout, and the model it is tried on; `core` rows are part of `make test`."""

    layout: dict[str, Any]
    variant: str = ""
    core: bool = False
    model: dict[str, Any] = {}  # noqa: RUF012 - never written to

    @property
    def name(self) -> str:
        words = [f"{key} {value}" if isinstance(value, int) else str(value) for key, value in self.layout.items()]
        return " x ".join([*words, *(key for key in self.model), *([self.variant] if self.variant else [])])

    def shape(self) -> dict[str, Any]:
        return {**VARIANTS[self.variant], **self.model}


def in_pipeline(core: str = "", variant: str = "", **layout: int) -> list[Row]:
    """A row for each schedule."""
    return [Row({"pipeline": 2, **layout, "schedule": s}, variant, s == core) for s in SCHEDULES]


ROWS = [
    Row({"shard": 2}, "QK-norm", core=True),
    Row({"replicate": 2}, "QKV bias"),
    Row({"replicate": 2, "shard": 2}),
    Row({"tensor": 2}, "QK-norm", core=True),
    Row({"tensor": 4}, "QKV bias"),
    Row({"context": 2}, "QKV bias", core=True),
    Row({"context": 4}, "QK-norm"),
    *in_pipeline("1f1b"),
    Row({"pipeline": 4, "schedule": "1f1b"}, "QK-norm"),
    Row({"pipeline": 4, "schedule": "zbv"}, "QKV bias", model={"layers": 8}),
    Row({"shard": 2, "tensor": 2}, "QKV bias", core=True),
    Row({"shard": 2, "context": 2}, "QK-norm"),
    Row({"context": 2, "tensor": 2}, "QK-norm"),
    *in_pipeline("zbv", "QKV bias", tensor=2),
    *in_pipeline("interleaved", "QK-norm", context=2),
    *in_pipeline("dualpipev", "QK-norm", shard=2, tensor=2),
    Row({"shard": 2, "context": 2, "tensor": 2}, "QKV bias"),
    *(Row({"shard": 2, "engine": "deepspeed", "zero_stage": stage}, "QK-norm") for stage in (1, 2, 3)),
    # recompute, on and off: the rows above are without
    Row({"shard": 2, "reshard": "always", "recompute": "block"}),
    Row({"shard": 2, "tensor": 2, "recompute": "block"}, "QK-norm"),
    Row({"context": 2, "tensor": 2, "recompute": "block"}),
    *(Row({**row.layout, "recompute": "block"}, "QKV bias") for row in in_pipeline(tensor=2)),
    Row({"shard": 2, "reshard": "always", "recompute": "selective"}, "QK-norm"),
    Row({"shard": 2, "tensor": 2, "recompute": "selective"}, "QK-norm", core=True),
    Row({"context": 2, "tensor": 2, "recompute": "selective"}),
    *(Row({**row.layout, "recompute": "selective"}, "QKV bias") for row in in_pipeline(tensor=2)),
    Row({"shard": 2, "engine": "deepspeed", "zero_stage": 2, "recompute": "selective"}, "QK-norm"),
    # tied embeddings where they are allowed
    *(
        Row(layout, variant, model={"tied": True})
        for layout, variant in (
            ({"shard": 2}, ""),
            ({"tensor": 2}, ""),
            ({"context": 2}, "QK-norm"),
            ({"shard": 2, "tensor": 2}, "QKV bias"),
            ({"shard": 2, "context": 2, "tensor": 2}, ""),
        )
    ),
]
# Of the list above, one number for each of its lines.
EXPECTED = [1, 1, 1, 1, 1, 1, 1, 5, 1, 1, 1, 1, 1, 5, 5, 5, 1, 3, 1, 1, 1, 5, 1, 1, 1, 5, 1, 5]


def test_the_matrix_is_whole() -> None:
    names = [row.name for row in ROWS]
    print(f"{len(ROWS)} rows, each in fp32 and, but for DeepSpeed's, in fp64")
    assert len(names) == len(set(names)) == sum(EXPECTED)
    special = [row for row in ROWS if row.variant]
    assert len(special) * 2 >= len(ROWS)
    assert {row.layout.get("schedule") for row in ROWS if row.core} >= {"1f1b", "zbv", "interleaved", "dualpipev"}


def core(names: Iterable[str], *fast: str) -> list[Any]:
    """All of them, of which some are part of `make test`."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def cases() -> list[Any]:
    return [
        pytest.param(
            row,
            precision,
            id=f"{row.name} {precision}",
            marks=[] if row.core and precision == "fp32" else pytest.mark.slow,
        )
        for row in ROWS
        for precision in (("fp32", "fp64") if row.layout.get("engine") != "deepspeed" else ("fp32",))
    ]


@pytest.mark.parametrize(("row", "precision"), cases())
def test_every_layout_is_the_single_device_run(row: Row, precision: str) -> None:
    together = run_on(config_of({**row.layout, "precision": precision}, row.shape()))
    found = differences(together, alone(precision, **row.shape()))
    check(found, f"{row.name} {precision}", BOUNDS if precision == "fp32" else EXACT)


@pytest.mark.parametrize("layout", [{"shard": 2}, {"replicate": 2}, {"replicate": 2, "shard": 2}], ids=str)
def test_initial_weights_are_bitwise_equal_under_every_layout(layout: dict[str, int]) -> None:
    initial = [run_on(config_of(ways), steps=0).tensors for ways in ({}, layout)]
    assert initial[0].keys() == initial[1].keys()
    assert all(np.array_equal(weight, initial[1][name]) for name, weight in initial[0].items())


@cache
def alone(precision: str, **shape: Any) -> Run:
    """One process, once for each model."""
    return run_on(config_of({"precision": precision}, shape))


REDUCED: dict[str, dict[str, Any]] = {
    "shard 2": {"shard": 2},
    "shard 2, freed": {"shard": 2, "reshard": "always"},
    "replicate 2 x shard 2": {"replicate": 2, "shard": 2, "micro_batch": 1},
    "shard 2 x context 2 x tensor 2": {"shard": 2, "context": 2, "tensor": 2},
    "shard 2, offloaded": {"shard": 2, "offload": "all"},
}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", core(REDUCED, "shard 2"))
def test_gradients_that_are_reduced_after_each_micro_batch(layout: str, precision: str) -> None:
    config = config_of({**REDUCED[layout], "reduce": "micro_batch", "precision": precision}, VARIANTS["QKV bias"])
    found = differences(run_on(config), alone(precision, **VARIANTS["QKV bias"]))
    check(found, f"{layout}, reduced each time, {precision}", BOUNDS if precision == "fp32" else EXACT)


OFFLOADED: dict[str, dict[str, Any]] = {
    "shard 2 x tensor 2": {"shard": 2, "tensor": 2},
    "tensor 2": {"tensor": 2},
    "pipeline 2, zbv": {"pipeline": 2, "schedule": "zbv"},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", OFFLOADED)
def test_offloaded_weights_are_trained_as_those_on_the_device(layout: str) -> None:
    """On a CPU the host's memory is the device's, but FSDP takes its code path for offloading."""
    together = run_on(config_of({**OFFLOADED[layout], "offload": "all"}))
    check(differences(together, alone("fp32")), f"{layout}, offloaded")


def test_offloaded_means_all_weights_where_nothing_else_needs_fsdp() -> None:
    config = config_of({"tensor": 2, "offload": "all"})
    for parameters, offloaded in on_ranks(offloaded_of, 2, config):
        assert parameters == offloaded > 0


def offloaded_of(config: RunConfig) -> tuple[int, int]:
    """How many parameters this rank has, and how many of them FSDP fetches from the host's memory."""
    with start_mesh(config.layout) as mesh:
        (model,) = build_parts(config, mesh)
        groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
        ours = [p.offload_to_cpu for group in {id(g): g for g in groups if g}.values() for p in group.fsdp_params]
        return len(list(model.parameters())), sum(ours)


COMPILED: dict[str, dict[str, Any]] = {
    "shard 2 x tensor 2": {"shard": 2, "tensor": 2},
    "context 2": {"context": 2},
    "pipeline 2 x tensor 2": {"pipeline": 2, "tensor": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", COMPILED)
def test_compiled_blocks_of_cut_tensors_are_the_single_device_run(layout: str) -> None:
    """A plain tensor must enter the first block: the gradient of one that was still being gathered was lost."""
    shape = VARIANTS["QK-norm"]
    one = run_on(config_of({}, shape), steps=2)
    compiled = config_of(COMPILED[layout], shape, kernels={"compile": True})
    check(differences(run_on(compiled, steps=2), one), f"compiled, {layout}")


@pytest.mark.parametrize("mutant", core(MUTANTS, "divisor", "norm-weight reduction", "document leak", "stage order"))
def test_the_comparison_sees_a_planted_fault(mutant: str) -> None:
    fault, layout, model = MUTANTS[mutant]
    one, config = alone("fp32", **model), config_of(layout, model)
    if mutant in DRIFT:  # what should be copies of one another is seen not to be
        with pytest.raises(AssertionError, match="copies differ"):
            run_on(config, fault)
        return
    found = differences(run_on(config, fault), one)
    worst = max(found, key=lambda kind: found[kind] / BOUNDS[kind])
    print(f"{mutant}: {worst} {found[worst]:.1e}")
    assert not found[worst] <= 10 * BOUNDS[worst]  # NaN is seen, too


def test_a_tensor_group_trains_without_a_warning() -> None:
    """FSDP's about views of a block's output: the rows above show that the gradients are right."""
    assert on_ranks(warned, 4, config_of({"shard": 2, "tensor": 2})) == [[]] * 4


def warned(config: RunConfig) -> list[str]:
    """What a rank's training warns of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        rank_of(config, None, 1)
    return [str(one.message) for one in found if "FSDP" in str(one.message)]
