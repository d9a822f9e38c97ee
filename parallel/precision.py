"""The dtype that a model computes in, beside the one its weights are kept in."""

import torch

from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def compute_dtype(config: RunConfig, mesh: Mesh) -> torch.dtype:
    """bf16 on a GPU and fp32 elsewhere, unless the layout says otherwise."""
    precision = config.layout.precision
    if precision == "auto":
        precision = "bf16" if mesh.device.type == "cuda" else "fp32"
    return DTYPES[precision]
