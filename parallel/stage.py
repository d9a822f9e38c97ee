"""A pipeline stage: the model with what belongs to other stages deleted, so that no name depends on the split."""

from collections.abc import Sequence

from torch import Tensor, nn

from minka.model.transformer import Transformer


def take_stage(model: Transformer, stage: int, stages: Sequence[range]) -> None:
    """Leave of `model` (on the meta device) the layers of `stages[stage]`, embedding and head at the ends."""
    for layer in list(model.blocks):
        if int(layer) not in stages[stage]:
            del model.blocks[layer]
    if stage > 0:
        model.embedding = nn.Identity()  # type: ignore[assignment]  # what comes in are hidden states
    if stage < len(stages) - 1:
        model.norm = nn.Identity()  # type: ignore[assignment]
        model.head = Onward()  # type: ignore[assignment]


class Onward(nn.Module):
    """In the place of a head that another stage has: hidden states go through as they are."""

    def logits(self, hidden_BTD: Tensor, at: int | None = None) -> Tensor:
        """As Head's, for hidden states that are not at their end."""
        return hidden_BTD

    def forward(self, hidden_BTD: Tensor, targets_BT: Tensor, reduce: bool = True) -> Tensor:
        """The same where there are targets."""
        return hidden_BTD
