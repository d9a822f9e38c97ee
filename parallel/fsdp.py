"""FSDP2 and HSDP: parameters, gradients and optimizer state cut over the ranks of the shard and context axes."""

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from minka.parallel.mesh import Mesh
from minka.plan.execution_choices import frees_gathered_weights, fsdp_units, needs_fsdp


def shard_model(model: nn.Module, blocks: list[nn.Module], mesh: Mesh) -> None:
    """Cut `model` (on the meta device) for this rank. `blocks` are its layers, in the order they run.

    Gradients are summed, not averaged: they are divided once, by the number of target tokens of the whole batch. They
    are added up in fp32 at least; those of bf16 weights are then rounded to bf16, once.
    """
    layout, dtype = mesh.layout, mesh.compute_dtype
    casts = torch.bfloat16 in (dtype, next(model.parameters()).dtype)
    if not needs_fsdp(layout, casts=casts):
        return
    if mesh.axes is None:
        if casts:
            raise RuntimeError("weights are cast by FSDP, which needs a process group: start_mesh(casts=True)")
        return
    axes = mesh.axes["replicate", "data"] if layout.replicate > 1 else mesh.axes["data"]
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if casts else None,
        reduce_dtype=torch.float32 if casts else dtype,
        cast_forward_inputs=False,  # the rotary angles come in as fp32 and must stay so
    )
    if layout.tensor > 1:
        # What a tensor group scatters comes back from DTensor as a view, and is a block's output. FSDP warns that
        # operations in place on it would lose a hook of backward. What takes a block's output, a norm that adds or the
        # sum for a next stage, makes a new tensor: gradients are those of one process (tests/parallel/test_parity.py).
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \((FSDPBlock(, )?)+\) returned a view", UserWarning)
    offload = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if layout.offload == "all" else OffloadPolicy()
    frees = frees_blocks(mesh, blocks)
    for unit in fsdp_units(block_bytes(blocks, dtype)):
        modules = [blocks[index] for index in unit]
        fully_shard(modules, mesh=axes, mp_policy=policy, offload_policy=offload, reshard_after_forward=frees)
    fully_shard(model, mesh=axes, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # neither setting is recursive
            module.set_gradient_divide_factor(1.0)
            # Not a sum that is multiplied before: gloo has none, and NCCL adds up plain sums in the switch (NVLS).
            module.set_force_sum_reduction_for_comms(True)


def frees_blocks(mesh: Mesh, blocks: Iterable[nn.Module]) -> bool:
    """Return whether gathered weights of blocks are freed after forward (plan/execution_choices.py)."""
    return frees_gathered_weights(mesh.layout, sum(block_bytes(blocks, mesh.compute_dtype)))


def block_bytes(blocks: Iterable[nn.Module], dtype: torch.dtype) -> list[int]:
    """Return each block's bytes in the compute dtype, of all ranks together."""
    return [sum(p.numel() for p in block.parameters()) * dtype.itemsize for block in blocks]
