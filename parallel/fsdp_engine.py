"""The engine of a model that is whole on each data rank's group: FSDP2 or HSDP, with tensor and context parallelism."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from minka.model.transformer import Transformer
from minka.parallel.apply import build_parts
from minka.parallel.engine import MicroBatch, ModelParts, Sums, TorchEngine
from minka.parallel.fsdp import frees_blocks
from minka.parallel.inputs import Fed, Feeder
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig


class ShardedScorer(ModelParts):
    """Forward passes of it, for evaluation. See Scorer."""

    def __init__(self, parts: Sequence[Transformer], mesh: Mesh, feeder: Feeder) -> None:
        super().__init__(parts, mesh, feeder)
        (self.model,) = parts

    def token_losses(self, micro_batch: MicroBatch) -> Tensor:
        """See Scorer."""
        b = micro_batch
        losses = self._forward(self.feeder(b.tokens, b.documents, b.positions, b.targets), reduce=False)
        losses = losses if self.mesh.leads_tensor else torch.zeros_like(losses)
        return self.feeder.spread(losses, b.tokens.shape[1])

    def next_logits(self, tokens: Tensor, place: int) -> Tensor:
        """See Scorer."""
        fed, at = self.feeder.one_row(tokens, place)
        logits = self._forward(fed, at=at or 0)[0, 0]
        return self.mesh.sum_(logits if self._tells(at) else torch.zeros_like(logits))

    def attention_logits(self, micro_batch: MicroBatch) -> dict[int, Tensor]:
        """See Engine."""
        probe: list[Tensor] = []
        b = micro_batch
        with torch.compiler.set_stance("force_eager"):
            self._forward(self.feeder(b.tokens, b.documents, b.positions, b.targets), reduce=False, probe=probe)
        return dict(zip(map(int, self.model.blocks), probe, strict=True))

    def _forward(self, fed: Fed, **options: object) -> Tensor:
        with torch.no_grad():
            result: Tensor = self.model(fed.tokens, fed.structure, fed.positions, fed.targets, **options)
        self._forget_gathered()
        return result


def build_scorer(config: RunConfig, mesh: Mesh) -> ShardedScorer:
    """A model with its initial weights, to be scored; no pipeline."""
    return ShardedScorer(build_parts(config, mesh), mesh, Feeder(config, mesh))


class ShardedEngine(TorchEngine, ShardedScorer):
    """All micro-batches of a step, one after the other; the same code trains one unsharded rank. See Engine."""

    def forward_backward(self, micro_batches: Sequence[MicroBatch], target_count: int) -> Sums:
        """See Engine."""
        found = []
        for index, b in enumerate(micro_batches):
            self._sync_gradients(index == len(micro_batches) - 1)
            fed = self.feeder(b.tokens, b.documents, b.positions, b.targets)
            sums = self.model(fed.tokens, fed.structure, fed.positions, fed.targets)
            (sums.objective / max(target_count, 1)).backward()
            found.append(torch.stack([sums.loss, sums.z_loss]))
        self._complete_gradients()
        return self._sum_up(found)

    def _sync_gradients(self, last: bool) -> None:
        """Whole gradients wait for the last micro-batch, or only this rank's pieces do; copies are summed once."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last or self.mesh.layout.reduce == "micro_batch")
            self.model.set_requires_all_reduce(last)
            self.model.set_is_last_backward(last)
            freed = frees_blocks(self.mesh, self.model.blocks.values(), self.feeder.dtype)
            self.model.set_reshard_after_backward(last, recurse=not freed)
