"""What a checkpoint says beside its tensors: where the run is, what it is, and where it came from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig
from minka.train.provenance import versions
from minka.train.schedule import learning_rate
from minka.train.state import State


def contents(
    config: RunConfig, state: State, mesh: Mesh, data_sha256: str, lineage: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The state of a checkpoint, plain JSON. Only the numbers of `state` are needed to go on; the rest is checked."""
    values = config.model_dump(mode="json")
    return {
        **state.as_json(),
        "config": values,
        "config_sha256": config_hash(values),
        "layout": mesh.layout.model_dump(mode="json"),
        "data_sha256": data_sha256,
        "learning_rate": learning_rate(config, state.step, state.tokens),  # of the next step
        "lineage": [dict(parent) for parent in lineage],
        "versions": versions("minka", "torch", "numpy", "safetensors"),
    }


def config_hash(values: Mapping[str, Any]) -> str:
    """sha256 of a configuration's canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
