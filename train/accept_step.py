"""Applies plan/guard.py on the device, and ends a run whose data cannot be trained on."""

from typing import NoReturn

import torch
from torch import Tensor

from minka.data.batch import Batch
from minka.parallel.engine import Sums
from minka.parallel.mesh import Mesh
from minka.plan.errors import UserError


def accepts(sums: Sums, grad_norm: Tensor) -> Tensor:
    """Scalar bool on the device: whether loss and gradient norm, both of the whole mesh, are finite.

    The rule of plan.guard.judge; here it gates the update without waiting for the host.
    """
    return torch.isfinite(sums.loss) & torch.isfinite(grad_norm)


def refuse_tokens(batch: Batch, vocab: int, mesh: Mesh) -> NoReturn:
    """Raise the same UserError on every rank, naming a sample with an id beyond the vocabulary."""
    beyond = (batch.tokens.amax(dim=1) >= vocab) | (batch.targets.amax(dim=1) >= vocab)
    numbers = [0] * 3 * mesh.ranks
    if beyond.any():
        numbers[3 * mesh.rank : 3 * mesh.rank + 3] = [1, int(batch.samples[beyond][0]), batch.largest_token()]
    found = mesh.sum_on_host(numbers)
    first = 3 * next(rank for rank in range(mesh.ranks) if found[3 * rank])
    raise UserError(
        f"sample {found[first + 1]} has token id {found[first + 2]}, and model.vocab is {vocab}",
        where="data.store",
        why="an id beyond the vocabulary has no embedding: the store is damaged, or made with a different tokenizer",
        remedy="`minka data verify STORE` says which file; prepare it again, or set model.vocab to its tokenizer's",
    )
