"""Offloaded moments under DeepSpeed: the update's scalars are where its kernel runs, and no gradient is copied back."""

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from minka.parallel.deepspeed_engine import DeepSpeedEngine
from minka.parallel.mesh import start_mesh
from minka.train.build_engine import build_engine
from parity import config_of, inputs_of
from ranks import on_ranks


def test_scale_and_refusal_are_on_the_device_of_the_moments() -> None:
    """Here the moments are on "meta": a GPU's scalars would be copied by torch, which does not wait for them."""
    steps: list[None] = []
    adamw = SimpleNamespace(param_groups=[{}])
    deepspeed = SimpleNamespace(step=lambda: steps.append(None))
    partitions = [torch.zeros(3, device="meta")]
    engine = SimpleNamespace(_partitions=partitions, _norm=torch.tensor(2.0), _adamw=adamw, _deepspeed=deepspeed)
    DeepSpeedEngine.apply(cast(Any, engine), 1e-3, 1.0, torch.tensor(True))
    assert [adamw.grad_scale.device.type, adamw.found_inf.device.type] == ["meta", "meta"]
    assert len(steps) == 1


def norm_where_gradients_are(stage: int) -> float:
    """The norm, where asking for the device is an error: of a step with moments on the host."""
    config = config_of({"engine": "deepspeed", "zero_stage": stage, "offload": "optimizer"})
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        batches, targets = inputs_of(config, 0, engine, mesh)
        engine.forward_backward(batches, targets)
        from deepspeed.accelerator import get_accelerator

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(get_accelerator(), "current_device_name", pytest.fail)
            return float(engine.grad_norm())


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the deepspeed extra")
def test_the_norm_of_offloaded_gradients_copies_none_of_them() -> None:
    (norm,) = on_ranks(norm_where_gradients_are, 1, 3)
    assert norm > 0
