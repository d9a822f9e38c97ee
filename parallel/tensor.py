"""Tensor and sequence parallelism, by torch's DTensor plans (Shoeybi et al. 2019; Korthikanti et al. 2022).

Attention is cut by whole heads, the feed-forward layer by columns and rows, embedding and head by rows of the
vocabulary. Between them each rank of a tensor group has some tokens of every sequence: norms and the residual stream
are cut there. Weights are DTensors over the mesh's tensor axis, so checkpoints and FSDP know how they are cut;
activations are plain tensors, so the model's own operations need no DTensor rules.
"""

from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from minka.kernels.accumulation_dtype import wide
from minka.kernels.linear_cross_entropy import VocabShard, linear_cross_entropy, token_losses
from minka.kernels.rms_norm import rms_norm
from minka.model.head import Head, HeadSums
from minka.model.transformer import Block, RMSNorm, Transformer
from minka.parallel.mesh import Mesh

TOKENS = Shard(1)  # of activations [B, T, D]


def cut_tensor(model: Transformer, mesh: Mesh) -> None:
    """Cut a model or a stage, on the meta device, over the tensor axis; nothing to do where that has one rank."""
    if mesh.layout.tensor == 1 or mesh.axes is None:
        return
    axis = mesh.axes["tensor"]
    for block in model.blocks.values():
        assert isinstance(block, Block)
        parallelize_module(block, axis, block_plan())
        for norm in (block.attention.q_norm, block.attention.k_norm):
            if norm is not None:
                parallelize_module(norm, axis, WholeWeight())
    if isinstance(model.embedding, nn.Embedding):
        parallelize_module(model.embedding, axis, VocabularyEmbedding())
    if isinstance(model.norm, RMSNorm):
        parallelize_module(model.norm, axis, WholeWeight())
    if isinstance(model.head, Head):
        model.head = VocabularyHead(model.head, axis)


def block_plan() -> dict[str, ParallelStyle]:
    """The plan of one block, whose input and output are this rank's tokens."""
    columns, rows = ColwiseParallel, lambda: RowwiseParallel(output_layouts=TOKENS)
    return {
        "attention_norm": WholeWeight(),
        "attention": _all_tokens(3),
        "attention.wq": columns(),
        "attention.wk": columns(),
        "attention.wv": columns(),
        "attention.wo": rows(),
        "mlp_norm": WholeWeight(),
        "mlp": _all_tokens(0),
        "mlp.gate": columns(),
        "mlp.up": columns(),
        "mlp.down": rows(),
    }


def _all_tokens(others: int) -> PrepareModuleInput:
    """Gather the first argument's tokens once, as a DTensor, so that its gradient is summed once as well."""
    rest = (None,) * others
    return PrepareModuleInput(input_layouts=(TOKENS, *rest), desired_input_layouts=(Replicate(), *rest))


class WholeWeight(ParallelStyle):
    """A norm that every rank has whole and applies to its own tokens: the gradients of its weight are partial sums."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, RMSNorm)
        _distribute(module, device_mesh, Replicate())

        def forward(x: Tensor) -> Tensor:
            return rms_norm(x, _local(module.weight, Partial()), module.eps)

        module.forward = forward  # type: ignore[method-assign]
        return module


class VocabularyEmbedding(ParallelStyle):
    """An embedding of which each rank has some rows; its output is this rank's tokens of each sequence."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        _distribute(module, device_mesh, Shard(0))
        module.forward = lambda input: _look_up(input, module.weight, device_mesh)  # type: ignore[method-assign]
        return module


class VocabularyHead(Head):
    """Head and loss over a vocabulary of which each rank has some rows. Its input is this rank's tokens."""

    def __init__(self, head: Head, axis: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.z_weight, self._tied, self.axis = head.z_weight, head._tied, axis
        if not self._tied:
            self.weight = head.weight
            _distribute(self, axis, Shard(0))
        group = axis.get_group()
        self._over = (
            lambda x: dist.all_reduce(x, dist.ReduceOp.MAX, group=group),
            lambda x: dist.all_reduce(x, group=group),
        )

    def logits(self, hidden_BTD: Tensor, at: int | None = None) -> Tensor:
        """`at` is a place in the whole sequence."""
        hidden = _gather_tokens(hidden_BTD, self.axis)
        hidden = hidden if at is None else hidden[:, at : at + 1]
        part = wide(F.linear(hidden, _local(self.matrix(), Shard(0))))
        return _redistributed(part, self.axis, Shard(part.ndim - 1), Replicate())

    def forward(self, hidden_BTD: Tensor, targets_BT: Tensor, reduce: bool = True) -> HeadSums | Tensor:
        """The results are equal on every rank of the group."""
        weight = _local(self.matrix(), Shard(0))
        chunk = self.chunk(weight)
        rows = VocabShard(self.axis.get_local_rank() * weight.shape[0], *self._over)
        hidden_ND = rearrange(_gather_tokens(hidden_BTD, self.axis), "b t d -> (b t) d")
        if reduce:
            return HeadSums(*linear_cross_entropy(hidden_ND, weight, targets_BT.flatten(), self.z_weight, chunk, rows))
        return token_losses(hidden_ND, weight, targets_BT.flatten(), chunk, rows).view(targets_BT.shape)


def _distribute(module: nn.Module, axis: DeviceMesh, placement: Placement) -> None:
    """The module's weight, on the meta device, as a DTensor: nothing is sent."""
    weight: Any = module.weight
    module.weight = nn.Parameter(distribute_tensor(weight.detach(), axis, [placement], src_data_rank=None))


def _local(weight: Tensor, gradient: Placement) -> Tensor:
    """This rank's rows, or all of them; `gradient` is how the gradients of the ranks combine."""
    assert isinstance(weight, DTensor)
    return weight.to_local(grad_placements=[gradient])


def _look_up(tokens_BT: Tensor, weight: Tensor, axis: DeviceMesh) -> Tensor:
    """Rows of other ranks are 0 here; the sum over the group is scattered, and each rank gets its own tokens."""
    rows = _local(weight, Shard(0))
    at = tokens_BT - axis.get_local_rank() * rows.shape[0]
    here = (at >= 0) & (at < rows.shape[0])
    x_BTD = F.embedding(at.where(here, 0), rows).masked_fill(~here[..., None], 0)
    # The copy waits for the collective: a compiled block would lose the gradient of a tensor that is still in flight.
    return _redistributed(x_BTD, axis, Partial(), TOKENS).clone()


def _gather_tokens(x_BTD: Tensor, axis: DeviceMesh) -> Tensor:
    """All tokens of a sequence; gradients are summed over the group, and each rank gets those of its own tokens."""
    whole = DTensor.from_local(x_BTD, axis, [TOKENS], run_check=False).redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial()])


def _redistributed(x: Tensor, axis: DeviceMesh, old: Placement, new: Placement) -> Tensor:
    return DTensor.from_local(x, axis, [old], run_check=False).redistribute(placements=[new]).to_local()
