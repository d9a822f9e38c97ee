"""The kernels of a run on its ranks, from `[kernels]`, the device and the sizes that tensor parallelism leaves."""

from minka.kernels.choose import Kernels, Machine, Work, choose
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig


def kernels_of(config: RunConfig, mesh: Mesh, *, as_gpu: bool = False) -> Kernels:
    """Which implementation of each operation runs; as_gpu: as if the rank had some GPU that the kernels support."""
    model, ways = config.model, mesh.layout.tensor
    widths = {"rms_norm": model.d_model, "rope": model.head_dim, "swiglu": model.d_ff // ways}
    machine = Machine("cuda", triton=True) if as_gpu else Machine.of(mesh.device)
    return choose(config.kernels.asked(), machine, Work(mesh.compute_dtype, widths, config.kernels.compile))
