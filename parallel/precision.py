"""The dtype that a model computes in, as torch's; weights stay fp32, or fp64."""

import torch

from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig
from minka.plan.sizing import compute_dtype_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def compute_dtype(config: RunConfig, mesh: Mesh) -> torch.dtype:
    """Return the dtype of activations and products on this rank's device."""
    return DTYPES[compute_dtype_name(config.layout, mesh.device.type)]
