"""Where a run is: a few numbers, the same on every rank, and all that a restart needs beside the tensors."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from minka.data.loader import LoaderState
from minka.parallel.pieces import Piece, piece_of


@dataclass(frozen=True)
class State:
    """`step` counts steps begun, refused ones too; samples and tokens are what those steps consumed."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    refused_in_a_row: int = 0

    @property
    def loader(self) -> LoaderState:
        """The data's share of it."""
        return LoaderState(samples=self.samples, tokens=self.tokens)

    def after(self, loader: LoaderState) -> "State":
        """The state once the batch that ends at `loader` has been trained on."""
        return replace(self, step=self.step + 1, samples=loader.samples, tokens=loader.tokens)

    def as_json(self) -> dict[str, int]:
        """For a checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "State":
        """From a checkpoint's manifest, which says more than this."""
        return cls(**{field.name: int(values[field.name]) for field in fields(cls)})


def randomness() -> dict[str, Piece]:
    """torch's generator on this rank as a tensor of a checkpoint. Nothing that trains draws from it so far."""
    return {"rng.torch": piece_of(torch.get_rng_state())}
