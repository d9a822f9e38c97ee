"""Random bits that follow from a key and an index, and stochastic rounding to bf16 with them."""

import pytest
import torch

from minka.kernels.random_bits import mix, round_to_bf16


def test_the_bits_are_those_of_splitmix64() -> None:
    """The published sequence of seed 1234567."""
    right = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    found = mix(torch.arange(5), 1234567)
    assert [number % 2**64 for number in found.tolist()] == right


@pytest.mark.parametrize("x", [1.0 + 2**-10, -1.0 - 3 * 2**-10, 3.3e-39, -1e-3, 12345.678])
def test_a_number_goes_to_its_neighbours_and_is_right_on_average(x: float) -> None:
    draws = 2**16
    exact = torch.full((draws,), x)
    found = round_to_bf16(exact, mix(torch.arange(draws), 7)).double()
    cut = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32).double()[0]  # towards zero
    step = ((exact.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32).double()[0] - cut
    assert set(found.unique().tolist()) == {float(cut), float(cut + step)}
    share = float((exact.double()[0] - cut) / step)
    away = float((found != cut).double().mean())
    assert abs(away - share) <= 4 * (share * (1 - share) / draws) ** 0.5


def test_what_bf16_has_already_is_not_changed() -> None:
    every = torch.arange(2**16, dtype=torch.int32) << 16  # all of bf16, as fp32
    x = every.view(torch.float32)
    found = round_to_bf16(x, torch.full((2**16,), -1))
    assert torch.equal(found[~x.isnan()], x[~x.isnan()].bfloat16())
    assert found[x.isnan()].isnan().all()
    assert found.signbit()[x == 0].tolist() == [False, True]


def test_no_bits_hide_a_nan() -> None:
    """Those that a GPU makes are all ones."""
    every = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001 | 0x400000], dtype=torch.int32).view(torch.float32)
    for bits in (0, 1, 0xFFFF):
        assert round_to_bf16(every, torch.full((4,), bits)).isnan().all()
