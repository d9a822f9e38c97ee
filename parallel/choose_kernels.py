"""The kernels of a run on its ranks, from `[kernels]`, the device and the sizes that tensor parallelism leaves."""

from minka.kernels.choose import Kernels, Machine, Work, choose
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig
from minka.plan.config_sections import ModelSection
from minka.plan.layout import Layout


def kernels_of(config: RunConfig, mesh: Mesh, *, as_gpu: bool = False) -> Kernels:
    """Which implementation of each operation runs; as_gpu: as if the rank had some GPU that the kernels support."""
    widths = widths_of(config.model, mesh.layout.tensor)
    machine = Machine("cuda", triton=True) if as_gpu else Machine.of(mesh.device)
    only_defined = {}
    if "bf16" in (config.optimizer.weights, config.optimizer.moments):
        only_defined = {"adamw": "torch's kernel has no stochastic rounding"}
    work = Work(mesh.compute_dtype, widths, config.kernels.compile, obstacles(mesh.layout), only_defined)
    return choose(config.kernels.asked(), machine, work)


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
