"""The kernels of a run on its ranks, from `[kernels]`, the device and the sizes that tensor parallelism leaves."""

import torch

from minka.kernels.choose import Kernels, Machine, Work, choose
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig
from minka.plan.config_sections import KernelsSection, ModelSection, OptimizerSection
from minka.plan.layout import Layout


def kernels_of(config: RunConfig, mesh: Mesh, *, as_gpu: bool = False) -> Kernels:
    """Which implementation of each operation runs; as_gpu: as if the rank had some GPU that the kernels support."""
    machine = Machine("cuda", triton=True) if as_gpu else Machine.of(mesh.device)
    work = work_of(config.model, config.optimizer, config.kernels, mesh.layout, mesh.compute_dtype)
    return choose(config.kernels.asked(), machine, work)


def work_of(
    model: ModelSection, optimizer: OptimizerSection, kernels: KernelsSection, layout: Layout, dtype: torch.dtype
) -> Work:
    """What a rank of a run computes."""
    only_defined = {}
    if "bf16" in (optimizer.weights, optimizer.moments):
        only_defined = {"adamw": "torch's kernel has no stochastic rounding"}
    return Work(dtype, widths_of(model, layout.tensor), kernels.compile, obstacles(layout), only_defined)


def obstacles(layout: Layout) -> dict[str, str]:
    """What keeps Triton's kernels from operations on what an engine holds elsewhere."""
    if layout.engine == "deepspeed":
        return {"adamw": "DeepSpeed updates the weights itself", "grad_norm": "DeepSpeed holds the gradients"}
    if layout.offload != "none":
        return dict.fromkeys(("adamw", "grad_norm"), f'with layout.offload="{layout.offload}" it runs on the host')
    return {}


def widths_of(model: ModelSection, tensor: int) -> dict[str, int]:
    """How wide the rows of each operation are on a rank of `tensor` tensor ranks."""
    return {
        "rms_norm": model.d_model,
        "rope": model.head_dim,
        "swiglu": model.d_ff // tensor,
        "attention": model.head_dim,
        "cross_entropy": model.vocab // tensor,
    }
