"""The engine of a pipeline: torch.distributed.pipelining's schedules over this rank's stages.

All micro-batches of a step go through one schedule. What a stage needs beside the hidden states (documents, positions,
targets) every rank has of its own batch, so nothing but hidden states and their gradients is sent.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from minka.model.head import HeadSums
from minka.model.transformer import Transformer
from minka.parallel.engine import MicroBatch, Optimizer, Sums, TorchEngine
from minka.parallel.inputs import Fed, Feeder
from minka.parallel.mesh import Mesh

ONE_STAGE: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
MANY_STAGES: dict[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


class PipelineEngine(TorchEngine):
    """`parts` are this rank's stages in the order they run; each may be sharded and cut besides. See Engine."""

    def __init__(self, parts: Sequence[Transformer], mesh: Mesh, feeder: Feeder, optimizer: Optimizer) -> None:
        super().__init__(parts, mesh, feeder, optimizer)
        assert mesh.axes is not None
        self.group = mesh.axes.get_group("pipeline")
        self.stages = mesh.layout.stages_of_rank(mesh.coordinate["pipeline"])
        self.last = mesh.layout.stage_count - 1
        self._work = _Work()
        for part in parts:
            _feed(part, self._work)
        self._schedules: dict[tuple[int, torch.Size], Any] = {}
        self._sending: list[Any] = []

    def forward_backward(self, micro_batches: Sequence[MicroBatch], target_count: int) -> Sums:
        """See Engine."""
        self._work.begin([self.feeder(b.tokens, b.documents, b.positions, b.targets) for b in micro_batches])
        self._work.divisor = max(target_count, 1)
        schedule = self._schedule(len(micro_batches), self._work.fed[0].tokens.shape)
        tokens = (torch.cat([fed.tokens for fed in self._work.fed]),) if 0 in self.stages else ()
        unused = torch.zeros(len(micro_batches)) if self.last in self.stages else None  # targets come with the work
        schedule.step(*tokens, target=unused, return_outputs=False)
        self._complete_gradients()
        return self._sum_up(self._work.sums)

    def token_losses(self, micro_batch: MicroBatch) -> Tensor:
        """See Scorer. Ranks go on as soon as their own stages are done, so that batch follows batch."""
        b = micro_batch
        losses = self._through(self.feeder(b.tokens, b.documents, b.positions, b.targets), reduce=False)
        if losses is None or not self.mesh.leads_tensor:
            return torch.zeros(b.tokens.shape, dtype=self._exact, device=self.mesh.device)
        return self.feeder.spread(losses, b.tokens.shape[1])

    def next_logits(self, tokens: Tensor, place: int) -> Tensor:
        """See Scorer."""
        fed, at = self.feeder.one_row(tokens, place)
        logits = self._through(fed._replace(targets=None), at=at or 0)
        row = torch.zeros(self.parts[0].cfg.vocab, dtype=self._exact, device=self.mesh.device)
        if logits is not None and self._tells(at):
            row += logits[0, 0]
        return self.mesh.sum_(row)

    def attention_logits(self, micro_batch: MicroBatch) -> dict[int, Tensor]:
        """See Engine."""
        probe: list[Tensor] = []
        b = micro_batch
        with torch.compiler.set_stance("force_eager"):
            self._through(self.feeder(b.tokens, b.documents, b.positions, b.targets), reduce=False, probe=probe)
        layers = [int(layer) for part in self.parts for layer in part.blocks]
        return dict(zip(layers, probe, strict=True))

    def _schedule(self, count: int, shape: torch.Size) -> Any:
        """The schedule for so many micro-batches of tokens [B, T / context]; the last one is kept."""
        if (count, shape) not in self._schedules:
            self._schedules.clear()  # it has a buffer for every micro-batch
            name = self.mesh.layout.schedule
            stages = [self._stage(stage, part, shape) for stage, part in zip(self.stages, self.parts, strict=True)]
            kind, over = (ONE_STAGE[name], stages[0]) if name in ONE_STAGE else (MANY_STAGES[name], stages)
            # Sums, not means: the one division is in the objective.
            self._schedules[count, shape] = kind(over, count, loss_fn=self._objective, scale_grads=False)
        return self._schedules[count, shape]

    def _stage(self, stage: int, part: Transformer, shape: torch.Size) -> PipelineStage:
        """Shapes are given: found out, they would cost a forward pass and be found again after each evaluation."""
        hidden = self._hidden(part, shape, "meta").requires_grad_()
        sums = HeadSums(*(torch.empty((), device="meta", requires_grad=i == 0) for i in range(3)))
        kind = _WholeBackward if self.mesh.layout.recompute != "none" else PipelineStage
        return kind(
            part,
            stage,
            self.last + 1,
            self.mesh.device,
            input_args=(torch.empty(shape, dtype=torch.int64, device="meta") if stage == 0 else hidden,),
            output_args=tuple(sums) if stage == self.last else (hidden,),
            group=self.group,
        )

    def _objective(self, sums: tuple[Tensor, Tensor, Tensor], unused: Tensor) -> Tensor:
        objective, loss, z_loss = sums
        self._work.sums.append(torch.stack([loss.detach(), z_loss.detach()]))
        return objective / self._work.divisor

    def _hidden(self, part: Transformer, shape: torch.Size, device: Any) -> Tensor:
        """Room for the hidden states that go from stage to stage: this rank's share of the tokens."""
        rows, length = shape
        width = part.cfg.d_model
        return torch.empty(rows, length // self.mesh.layout.tensor, width, dtype=self.feeder.dtype, device=device)

    def _through(self, fed: Fed, **options: object) -> Tensor | None:
        """One forward pass, stage by stage; what the last one gives, where it is."""
        layout, me = self.mesh.layout, self.mesh.coordinate["pipeline"]
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
        x = fed.tokens
        for stage, part in zip(self.stages, self.parts, strict=True):
            if stage > 0 and layout.rank_of_stage(stage - 1) != me:
                x = self._hidden(part, fed.tokens.shape, self.mesh.device)
                dist.recv(x, group=self.group, group_src=layout.rank_of_stage(stage - 1))
            with torch.no_grad():
                x = part(x, fed.structure, fed.positions, fed.targets, **options)
            if stage < self.last and layout.rank_of_stage(stage + 1) != me:
                onward = x.contiguous()
                to = layout.rank_of_stage(stage + 1)
                self._sending.append((dist.isend(onward, group=self.group, group_dst=to), onward))
        self._forget_gathered()
        return x if self.last in self.stages else None


class _Work:
    """The micro-batches of a step, and what became of them."""

    def __init__(self) -> None:
        self.fed: list[Fed] = []
        self.sums: list[Tensor] = []
        self.divisor = 1
        self._taken: dict[int, int] = {}

    def begin(self, fed: list[Fed]) -> None:
        self.fed, self.sums, self._taken = fed, [], {}

    def take(self, part: Transformer) -> Fed:
        """The next one for a stage: every schedule takes them through a stage in order."""
        index = self._taken.get(id(part), 0)
        self._taken[id(part)] = index + 1
        return self.fed[index]


def _feed(part: Transformer, work: _Work) -> None:
    """Called with hidden states alone, as a schedule does, the part takes the rest from `work`."""
    forward: Any = part.forward

    def fed(x: Tensor, *given: Any, **options: Any) -> Any:
        if given:
            return forward(x, *given, **options)
        own = work.take(part)
        found = forward(x, own.structure, own.positions, own.targets)
        return tuple(found) if isinstance(found, HeadSums) else found  # schedules know tuples only

    part.forward = fed  # type: ignore[method-assign,assignment]


class _WholeBackward(PipelineStage):
    """Under recomputation a split backward would run each block's forward again for every group of weights."""

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward=True, last_backward=last_backward)

    def backward_weight_one_chunk(self, *args: Any, **options: Any) -> None:
        return
