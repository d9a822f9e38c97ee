"""The state of a training run, the same on every rank, and what a checkpoint's manifest says of it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from minka.data.loader import LoaderState
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, piece_of
from minka.plan.config import RunConfig
from minka.train.provenance import versions
from minka.train.schedule import learning_rate


@dataclass(frozen=True)
class State:
    """`step` counts steps begun, refused ones too; samples and tokens are what those steps consumed."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    refused_in_a_row: int = 0

    @property
    def loader(self) -> LoaderState:
        """The position in the data."""
        return LoaderState(samples=self.samples, tokens=self.tokens)

    def after(self, loader: LoaderState) -> "State":
        """The state after a step on the batch that ends at `loader`."""
        return replace(self, step=self.step + 1, samples=loader.samples, tokens=loader.tokens)

    @classmethod
    def from_json(cls, values: Any) -> "State":
        """From a checkpoint's manifest, which has more fields."""
        return cls(**{field.name: int(values[field.name]) for field in fields(cls)})


def manifest_state(
    config: RunConfig, state: State, mesh: Mesh, run_id: str, data_sha256: str, lineage: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The `state` of a checkpoint's manifest, plain JSON. A resume reads the numbers of `state` and checks the rest."""
    values = config.model_dump(mode="json")
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return {
        **asdict(state),
        "run_id": run_id,
        "config": values,
        "config_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
        "layout": mesh.layout.model_dump(mode="json"),
        "data_sha256": data_sha256,
        "learning_rate": learning_rate(config, state.step, state.tokens),  # of the next step
        "lineage": [dict(parent) for parent in lineage],
        "versions": versions("minka", "torch", "numpy", "safetensors"),
    }


def random_state() -> dict[str, Piece]:
    """torch's generator on this rank as a tensor of a checkpoint. Training does not draw from it so far."""
    return {"rng.torch": piece_of(torch.get_rng_state())}
