"""The passes of a model that is whole on each rank's group: FSDP2 or HSDP, with tensor and context parallelism."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from minka.model.transformer import Transformer
from minka.parallel.apply import build_parts
from minka.parallel.engine import Scorer
from minka.parallel.fsdp import frees_blocks
from minka.parallel.inputs import InputCutter, ModelInputs
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig


def build_scorer(config: RunConfig, mesh: Mesh) -> Scorer:
    """A model with its initial weights, to be scored; no pipeline.

    Its weights are fp32, whatever the run's: fp32 has those of every checkpoint exactly.
    """
    stored = config.optimizer.model_copy(update={"weights": "fp32"})
    config = config.model_copy(update={"optimizer": stored})
    return Scorer(FsdpExecutor(build_parts(config, mesh), mesh), InputCutter.of(config, mesh))


class FsdpExecutor:
    """Runs the micro-batches of a step one after the other; a single rank without sharding runs the same code."""

    def __init__(self, parts: Sequence[Transformer], mesh: Mesh) -> None:
        self.parts, self.mesh = parts, mesh
        (self.model,) = parts
        self.trained: Any = self.model  # what a step calls

    def forward(self, inputs: ModelInputs, **options: object) -> Tensor:
        b = inputs.to(self.mesh.device, self.mesh.compute_dtype)
        return self.model(b.tokens, b.structure, b.positions, b.targets, **options)

    def forward_backward(self, micro_batches: Sequence[ModelInputs], divisor: int) -> list[Tensor]:
        found = []
        for index, inputs in enumerate(micro_batches):
            self.schedule_reduction(last=index == len(micro_batches) - 1)
            b = inputs.to(self.mesh.device, self.mesh.compute_dtype)
            sums = self.trained(b.tokens, b.structure, b.positions, b.targets)
            self.backward(sums.objective / divisor)
            found.append(torch.stack([sums.loss.detach(), sums.z_loss.detach()]))
        return found

    def backward(self, objective: Tensor) -> None:
        objective.backward()

    def schedule_reduction(self, *, last: bool) -> None:
        """Reduce gradients over replicas in the last micro-batch; over shards there too, or in each (layout.reduce)."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last or self.mesh.layout.reduce == "micro_batch")
            self.model.set_requires_all_reduce(last)
            self.model.set_is_last_backward(last)
            freed = frees_blocks(self.mesh, self.model.blocks.values())
            self.model.set_reshard_after_backward(last, recurse=not freed)
