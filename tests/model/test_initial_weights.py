"""Initial weights follow from (seed, name, global index) alone, and are truncated normal numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minka.model import initial_weights as init_module
from minka.model.initial_weights import fill_
from minka.model.transformer import Transformer
from minka.plan.config_sections import ModelSection
from models import section

CFG = section(init_std=0.5)
NAME = "blocks.1.mlp.gate.weight"


def box(
    offset: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...], name: str = NAME, seed: int = 1
) -> Tensor:
    local = torch.full(shape, torch.nan)
    fill_(local, name, seed, CFG, offset=offset, global_shape=whole)
    return local


WHOLE = box((0, 0), (83, 61), (83, 61))


@given(data=st.data())
def test_any_box_is_that_slice_of_the_whole(data: st.DataObject) -> None:
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in WHOLE.shape]
    (top, bottom), (left, right) = bounds
    assert torch.equal(box((top, left), (bottom - top, right - left), (83, 61)), WHOLE[top:bottom, left:right])


def test_chunks_threads_strides_and_dimensions_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(init_module, "CHUNK", 150)
    try:
        torch.set_num_threads(1)
        assert torch.equal(box((0, 0), (83, 61), (83, 61)), WHOLE)
    finally:
        torch.set_num_threads(threads)
    turned = torch.empty(61, 83).t()
    fill_(turned, NAME, 1, CFG, offset=(0, 0), global_shape=(83, 61))
    assert torch.equal(turned, WHOLE)
    assert torch.equal(box((0,), (83 * 61,), (83 * 61,)).view(83, 61), WHOLE)
    assert torch.equal(box((2, 1, 0), (3, 2, 7), (5, 3, 7)), box((0, 0, 0), (5, 3, 7), (5, 3, 7))[2:, 1:])


def test_numbers_do_not_change_between_versions() -> None:
    """Goldens: initial weights of seed 1 must stay the same forever."""
    expected = [-0.21921072900295258, -0.40922436118125916, 0.33814921975135803, -0.12271711975336075]
    assert WHOLE.flatten()[:4].tolist() == expected


def test_seeds_and_names_give_unrelated_numbers() -> None:
    others = [box((0, 0), (83, 61), (83, 61), seed=2), box((0, 0), (83, 61), (83, 61), name=NAME.replace("1", "0"))]
    for other in others:
        correlation = torch.corrcoef(torch.stack((WHOLE.flatten(), other.flatten())))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(WHOLE.numel())
    lagged = torch.corrcoef(torch.stack((WHOLE.flatten()[1:], WHOLE.flatten()[:-1])))[0, 1]
    assert abs(lagged) < 4 / math.sqrt(WHOLE.numel())


def test_moments_are_those_of_the_normal_truncated_at_three_sigma() -> None:
    """Closed forms for the variance and fourth moment; bars of 4 standard errors."""
    n = 2_000_000
    x = box((0, 0), (2000, 1000), (2000, 1000)).double() / CFG.init_std
    edge = 2 * 3 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2))
    variance, fourth = 1 - edge, 3 * (1 - edge) - 9 * edge
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.square().mean() - variance) < 4 * math.sqrt((fourth - variance**2) / n)
    assert abs(x.pow(3).mean()) < 4 * math.sqrt(15 / n)
    assert abs(x.pow(4).mean() - fourth) < 4 * math.sqrt(105 / n)
    assert 2.99 < x.abs().max() <= 3
    tenths = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = torch.tensor([-1.27542, 0.0, 1.27542], dtype=torch.float64)
    torch.testing.assert_close(torch.quantile(x.flatten()[:1_000_000], tenths), expected, rtol=0, atol=7e-3)


def test_norms_are_one_biases_zero_and_what_writes_to_the_stream_is_small() -> None:
    cfg = section(qkv_bias=True, qk_norm=True, layers=8, d_model=96, d_ff=128, init_std=0.02)
    model = Transformer(cfg)
    initialise(model, 0, cfg)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith(".bias"):
            assert (parameter == 0).all(), name
        else:
            scaled = name.endswith(("wo.weight", "down.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / (4 if scaled else 1) * 0.98658, rel=0.05), name


def initialise(model: Transformer, seed: int, cfg: ModelSection) -> None:
    """Set every parameter of a whole model on one device."""
    for name, parameter in model.named_parameters():
        fill_(parameter, name, seed, cfg, offset=[0] * parameter.ndim, global_shape=parameter.shape)
