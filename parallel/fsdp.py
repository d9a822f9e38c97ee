"""FSDP2 and HSDP: parameters, gradients and optimizer state cut over the ranks of the shard and context axes."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from minka.parallel.mesh import Mesh

# Blocks are gathered together until a unit has this many bytes: smaller messages are all latency. Measured with gloo on
# two cores (LOG.md): a 1M-parameter model in one unit loses 2 % to sharding, block by block 5 %.
UNIT_BYTES = 32 * 2**20
# Gathered weights up to this size stay until backward under reshard = "auto": a second gather costs more than they do.
KEEP_BYTES = 2 * 2**30


def shard_model(model: nn.Module, blocks: list[nn.Module], mesh: Mesh, precision: torch.dtype) -> nn.Module:
    """Cut `model` (on the meta device) for this rank. `blocks` are its layers, in the order they run.

    Sums, not means: gradients are divided once, by the number of target tokens of the whole batch.
    """
    layout = mesh.layout
    alone = layout.replicate * layout.shard * layout.context == 1
    if mesh.axes is None or (alone and precision != torch.bfloat16 and layout.offload == "none"):
        return model  # nothing to cut, to cast or to fetch
    axes = mesh.axes["replicate", "data"] if layout.replicate > 1 else mesh.axes["data"]
    policy = MixedPrecisionPolicy(
        param_dtype=precision if precision == torch.bfloat16 else None,
        reduce_dtype=torch.float32 if precision == torch.bfloat16 else precision,
        cast_forward_inputs=False,  # the rotary angles come in as fp32 and must stay so
    )
    away = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if layout.offload == "all" else OffloadPolicy()
    reshard = reshards(mesh, blocks, precision)
    for unit in units(blocks, precision):
        fully_shard(unit, mesh=axes, mp_policy=policy, offload_policy=away, reshard_after_forward=reshard)
    fully_shard(model, mesh=axes, mp_policy=policy, offload_policy=away, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # neither setting is recursive
            module.set_gradient_divide_factor(1.0)
            if mesh.needs_sum_on_gloo:
                module.set_force_sum_reduction_for_comms(True)
    return model


def home(mesh: Mesh) -> torch.device:
    """Where weights, gradients and moments are kept: offloaded, FSDP copies weights to the device as it gathers them.

    Gradients come back when they are reduced, so the update is the host's work.
    """
    return torch.device("cpu") if mesh.layout.offload == "all" else mesh.device


def units(blocks: list[nn.Module], precision: torch.dtype) -> list[list[nn.Module]]:
    """Consecutive blocks in groups of at least UNIT_BYTES; none when all of them together are smaller."""
    groups: list[list[nn.Module]] = []
    group: list[nn.Module] = []
    for block in blocks:
        group.append(block)
        if sum(_bytes(b, precision) for b in group) >= UNIT_BYTES:
            groups.append(group)
            group = []
    if group and groups:
        groups[-1].extend(group) if len(group) * 2 <= len(groups[-1]) else groups.append(group)
    return groups


def reshards(mesh: Mesh, blocks: Iterable[nn.Module], precision: torch.dtype) -> bool:
    """Whether gathered weights of blocks are freed after forward. What is not stays to the last backward of a step."""
    if mesh.layout.reshard == "auto" and mesh.layout.pipeline > 1:
        return False  # each micro-batch would gather them again, and a split backward needs the very ones of forward
    if mesh.layout.reshard == "auto":
        return sum(_bytes(block, precision) for block in blocks) > KEEP_BYTES
    return mesh.layout.reshard == "always"


def _bytes(module: nn.Module, precision: torch.dtype) -> int:
    return sum(p.numel() for p in module.parameters()) * precision.itemsize
