"""A range of a flattened tensor as boxes of the tensor."""

import math

import numpy as np
import pytest

from minka.parallel.deepspeed_slices import boxes


@pytest.mark.parametrize("shape", [(7,), (5, 3), (1, 9), (4, 3, 5)])
def test_every_range_is_a_few_boxes_that_hold_it_in_order(shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    index = np.arange(count).reshape(shape)
    for first in range(count + 1):
        for last in range(first, count + 1):
            found = boxes(shape, first, last)
            inside = [index[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))] for box in found]
            assert np.array_equal(np.concatenate([box.ravel() for box in inside]), np.arange(first, last))
            assert len(found) <= 2 * len(shape) - 1
