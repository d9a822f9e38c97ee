"""A concrete architecture of about so many weights, whose dimensions suit matrix tiles, heads and layouts."""

import math
from collections.abc import Iterator

from minka.plan.errors import UserError
from minka.plan.flops import Shape, parameters

LEAST_VOCAB = 16


def usual_vocab(size: float) -> int:
    """Return a vocabulary for so many weights: of a small model it must not take all of them."""
    for least, vocab in ((3e9, 128_256), (3e7, 49_152), (3e6, 8_192), (3e5, 2_048)):
        if size >= least:
            return vocab
    return 256  # bytes


def shape_of_size(size: float, vocab: int = 0) -> Shape:
    """Return the shape whose weights, embedding and head included, come nearest to `size`, if need be less well built.

    Width grows faster than depth, as in published models: d_model / layers is 32 at a width of 128, 64 at 768, 128 from
    4,096 on. Raises UserError where even the smallest shape is larger by half.
    """
    vocab = vocab or usual_vocab(size)
    if vocab < LEAST_VOCAB:
        raise UserError(f"{vocab}", where="--vocab", remedy=f"give {LEAST_VOCAB} entries or more, or leave it out")
    best = min(_shapes(vocab, size), key=lambda shape: _badness(shape, size))
    if parameters(best) < size / 1.5:
        what = f"no architecture is planned for {size:.3g} weights"
        raise UserError(what, where="minka plan budget", remedy=f"the largest has {parameters(best):.3g}: spend less")
    if parameters(best) > 1.5 * size:
        what = f"no model of {size:,.0f} weights has a vocabulary of {vocab:,}"
        remedy = f"the smallest has {parameters(best):,}: spend more, or say a smaller --vocab"
        raise UserError(what, where="--vocab", remedy=remedy)
    return best


def _badness(shape: Shape, size: float) -> float:
    wanted = min(128.0, 128 * (shape.d_model / 4096) ** 0.4)
    aspect = math.log(shape.d_model / shape.layers / wanted)
    return abs(math.log(parameters(shape) / size)) + 0.15 * abs(aspect)


def _shapes(vocab: int, size: float) -> Iterator[Shape]:
    """All that could be meant."""
    for width in _widths():
        if width * vocab > 2 * size and width > 16:
            return
        step = 4 if width >= 2048 else 2 if width >= 512 else 1
        for layers in range(step, 200, step):
            shape = _shape(width, layers, vocab, tied=size < 3e9)
            yield shape
            if parameters(shape) > 1.5 * size:
                break


def _widths() -> Iterator[int]:
    """From 512 on with heads in fours, from 4,096 on in eights: tensor groups own whole heads."""
    yield from range(16, 128, 16)
    yield from range(128, 512, 64)
    yield from range(512, 1024, 256)
    yield from range(1024, 4096, 512)
    yield from range(4096, 32_769, 1024)


def _shape(width: int, layers: int, vocab: int, *, tied: bool) -> Shape:
    head = 128 if width >= 1024 else 64 if width >= 512 else 32 if width >= 128 else 16
    heads = width // head
    shared = [ways for ways in (8, 4, 2, 1) if heads % ways == 0 and ways <= max(1, heads // 2)]
    tile = 256 if width >= 1024 else 64 if width >= 128 else 16
    wide = -(-8 * width // (3 * tile)) * tile  # three matrices of it weigh as much as two of 4 x width
    return Shape(layers, width, heads, shared[0], head, wide, vocab, tied=tied, qk_norm=True)
