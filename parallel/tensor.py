"""Tensor and sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022).

Attention is cut by whole heads, the feed-forward layer by columns and rows, embedding and head by rows of the
vocabulary. Between them each rank of a tensor group has some tokens of every sequence: norms and the residual stream
are cut there. Weights are DTensors over the mesh's tensor axis, so checkpoints and FSDP know how they are cut;
products run on the plain tensors within: DTensor's dispatch of them took a sixth of a step on two cores (LOG.md).
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from minka.kernels.cross_entropy import VocabShard
from minka.model.head import Head, HeadSums
from minka.model.transformer import RMSNorm, Transformer
from minka.parallel.mesh import Mesh

TOKENS = Shard(1)  # of activations [B, T, D]


def cut_tensor(model: Transformer, mesh: Mesh) -> None:
    """Cut a model or a stage, on the meta device, over the tensor axis; nothing to do where that has one rank."""
    if mesh.layout.tensor == 1 or mesh.axes is None:
        return
    axis = mesh.axes["tensor"]
    blocks: list[Any] = list(model.blocks.values())
    for block in blocks:  # whose input and output are this rank's tokens
        attention, mlp = block.attention, block.mlp
        for product in (attention.wq, attention.wk, attention.wv, mlp.gate, mlp.up):
            _cut_columns(product, axis)
        for product in (attention.wo, mlp.down):
            _cut_rows(product, axis)
        for part in (attention, mlp):
            _gather_tokens(part, axis)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            _cut_norm(module, axis)
    if isinstance(model.embedding, nn.Embedding):
        _cut_embedding(model.embedding, axis)
    if isinstance(model.head, Head):
        model.head = VocabularyHead(model.head, axis)


def _cut_columns(product: nn.Linear, axis: DeviceMesh) -> None:
    """Each rank has some outputs, of all tokens. The gradients of the ranks' inputs are partial sums."""
    _distribute(product, axis, Shard(0))

    def forward(x_BTD: Tensor) -> Tensor:
        bias = None if product.bias is None else _local(product.bias, Shard(0))
        return F.linear(x_BTD, _local(product.weight, Shard(0)), bias)

    product.forward = forward  # type: ignore[method-assign,assignment]


def _cut_rows(product: nn.Linear, axis: DeviceMesh) -> None:
    """Each rank has some inputs; the sum over the group is scattered, and each rank gets its own tokens."""
    _distribute(product, axis, Shard(1))

    def forward(x_BTF: Tensor) -> Tensor:
        return _redistributed(F.linear(x_BTF, _local(product.weight, Shard(1))), axis, Partial(), TOKENS)

    product.forward = forward  # type: ignore[method-assign,assignment]


def _gather_tokens(part: nn.Module, axis: DeviceMesh) -> None:
    """Gather its first argument's tokens once, so that their gradient is summed once as well."""
    forward: Callable[..., Any] = part.forward

    def gathered(x_BTD: Tensor, *rest: Any) -> Any:
        return forward(_redistributed(x_BTD, axis, TOKENS, Replicate(), gradient=[Partial()]), *rest)

    part.forward = gathered


def _cut_norm(norm: RMSNorm, axis: DeviceMesh) -> None:
    """Every rank has it whole and applies it to its own tokens: the gradients of its weight are partial sums."""
    _distribute(norm, axis, Replicate())
    norm.here = lambda: _local(norm.weight, Partial())  # type: ignore[method-assign]


def _cut_embedding(embedding: nn.Embedding, axis: DeviceMesh) -> None:
    """Each rank has some rows; the output is this rank's tokens of each sequence."""
    _distribute(embedding, axis, Shard(0))

    def forward(tokens_BT: Tensor) -> Tensor:
        """Rows of other ranks are 0 here; the sum over the group is scattered, and each rank gets its own tokens."""
        rows = _local(embedding.weight, Shard(0))
        at = tokens_BT - axis.get_local_rank() * rows.shape[0]
        here = (at >= 0) & (at < rows.shape[0])
        x_BTD = F.embedding(at.where(here, 0), rows).masked_fill(~here[..., None], 0)
        # The copy waits for the collective: a compiled block would lose the gradient of a tensor still in flight.
        return _redistributed(x_BTD, axis, Partial(), TOKENS).clone()

    embedding.forward = forward  # type: ignore[method-assign,assignment]


class VocabularyHead(Head):
    """Head and loss over a vocabulary of which each rank has some rows. Its input is this rank's tokens."""

    def __init__(self, head: Head, axis: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.z_weight, self.how, self._tied, self.axis = head.z_weight, head.how, head._tied, axis
        if not self._tied:
            self.weight = head.weight
            _distribute(self, axis, Shard(0))
        group = axis.get_group()
        self._over = (
            lambda x: dist.all_reduce(x, dist.ReduceOp.MAX, group=group),
            lambda x: dist.all_reduce(x, group=group),
        )

    def rows(self) -> tuple[Tensor, VocabShard]:
        weight = _local(self.matrix(), Shard(0))
        return weight, VocabShard(self.axis.get_local_rank() * weight.shape[0], *self._over)

    def logits(self, hidden_BTD: Tensor, at: int | None = None) -> Tensor:
        """`at` is a place in the whole sequence."""
        part = super().logits(self._gather(hidden_BTD), at)
        return _redistributed(part, self.axis, Shard(part.ndim - 1), Replicate())

    def forward(self, hidden_BTD: Tensor, targets_BT: Tensor, reduce: bool = True) -> HeadSums | Tensor:
        """The results are equal on every rank of the group."""
        return super().forward(self._gather(hidden_BTD), targets_BT, reduce)

    def _gather(self, x_BTD: Tensor) -> Tensor:
        """All tokens; gradients are summed over the group, and each rank gets those of its own tokens."""
        return _redistributed(x_BTD, self.axis, TOKENS, Replicate(), gradient=[Partial()])


def _distribute(module: nn.Module, axis: DeviceMesh, placement: Placement) -> None:
    """The module's weight and bias, on the meta device, as DTensors: nothing is sent."""
    for name, parameter in [*module.named_parameters(recurse=False)]:
        whole = parameter.detach()
        cut = nn.Parameter(distribute_tensor(whole, axis, [placement], src_data_rank=None))
        module.register_parameter(name, cut)


def _local(weight: Tensor, gradient: Placement) -> Tensor:
    """This rank's rows, or all of them; `gradient` is how the gradients of the ranks combine."""
    assert isinstance(weight, DTensor)
    return weight.to_local(grad_placements=[gradient])


def _redistributed(
    x: Tensor, axis: DeviceMesh, old: Placement, new: Placement, gradient: list[Partial] | None = None
) -> Tensor:
    whole = DTensor.from_local(x, axis, [old], run_check=False).redistribute(placements=[new])
    return whole.to_local(grad_placements=gradient)
