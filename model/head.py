"""From hidden states and targets to the loss; the only module that uses the vocabulary's matrix.

N tokens of the flattened batch · D width · V vocabulary
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minka.kernels.accumulation_dtype import wide
from minka.kernels.cross_entropy import ALL_ROWS, How, VocabShard
from minka.kernels.linear_cross_entropy import linear_cross_entropy, token_losses
from minka.plan.execution_choices import logit_rows


class HeadSums(NamedTuple):
    """Sums over the targets of a micro-batch; scalars in fp32."""

    objective: Tensor  # loss + z_loss; the only one with a gradient
    loss: Tensor  # nats
    z_loss: Tensor  # weighted


class Head(nn.Module):
    """Projection to the vocabulary and the loss on it. `tied` shares the embedding's weights and owns none."""

    device_kind = ""  # whose number of logits at once is taken; empty: that of the device of the tensors

    def __init__(
        self, d_model: int, vocab: int, z_weight: float, tied: nn.Embedding | None, how: How = "torch"
    ) -> None:
        super().__init__()
        self.z_weight, self.how = z_weight, how
        # A tuple hides the embedding from nn.Module: the weight then exists once, and what replaces it in the embedding
        # (to_empty, FSDP2, tensor parallelism) cannot untie it.
        self._tied = () if tied is None else (tied,)
        if tied is None:
            self.weight = nn.Parameter(torch.empty(vocab, d_model, dtype=torch.float32))

    def matrix(self) -> Tensor:
        """The weights [V, D], own or the embedding's."""
        return self._tied[0].weight if self._tied else self.weight

    def rows(self) -> tuple[Tensor, VocabShard]:
        """The rows of the matrix that are here, and which these are: all of them on one device."""
        return self.matrix(), ALL_ROWS

    def logits(self, hidden_BTD: Tensor, at: int | None = None) -> Tensor:
        """fp32 logits [B, T, V], or [B, 1, V] of the tokens at place `at`; for evaluation and generation only."""
        return wide(F.linear(hidden_BTD if at is None else hidden_BTD[:, at : at + 1], self.rows()[0]))

    def forward(self, hidden_BTD: Tensor, targets_BT: Tensor, reduce: bool = True) -> HeadSums | Tensor:
        """HeadSums over the targets that are not IGNORED; with reduce=False the losses [B, T], 0 where ignored.

        The losses carry no gradient.
        """
        hidden_ND, targets_N = rearrange(hidden_BTD, "b t d -> (b t) d"), targets_BT.flatten()
        weight_VD, rows = self.rows()
        chunk = logit_rows(weight_VD.shape[0], self.device_kind or weight_VD.device.type)
        if reduce:
            return HeadSums(
                *linear_cross_entropy(hidden_ND, weight_VD, targets_N, self.z_weight, chunk, rows, self.how)
            )
        return token_losses(hidden_ND, weight_VD, targets_N, chunk, rows, self.how).loss.view(targets_BT.shape)
