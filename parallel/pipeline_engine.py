"""The passes of a pipeline: torch.distributed.pipelining's schedules over this rank's stages.

All micro-batches of a step go through one schedule. Every rank has the documents, positions and targets of its own
batch, so that only hidden states and their gradients are sent.
"""

from collections.abc import Iterator, Sequence
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
from minka.parallel.inputs import ModelInputs
from minka.parallel.mesh import Mesh

ONE_STAGE: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
MANY_STAGES: dict[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


class PipelineExecutor:
    """Runs this rank's stages; `parts` are in the order they run, and each may be sharded and cut as well."""

    def __init__(self, parts: Sequence[Transformer], mesh: Mesh) -> None:
        assert mesh.axes is not None
        self.parts, self.mesh = parts, mesh
        self.group = mesh.axes.get_group("pipeline")
        self.stages = mesh.layout.stages_of_rank(mesh.coordinate["pipeline"])
        self.last = mesh.layout.stage_count - 1
        self._divisor, self._sums = 1, list[Tensor]()  # of the step
        self._inputs: list[Iterator[ModelInputs]] = []  # of each part: of its next micro-batch, and so on
        for index, part in enumerate(parts):
            self._hand_inputs_to(index, part)
        self._schedules: dict[tuple[int, torch.Size], Any] = {}
        self._sending: list[Any] = []
        self._connect()

    def forward_backward(self, micro_batches: Sequence[ModelInputs], divisor: int) -> list[Tensor]:
        inputs = [one.to(self.mesh.device, self.mesh.compute_dtype) for one in micro_batches]
        self._divisor, self._sums, self._inputs = divisor, [], [iter(inputs) for _ in self.parts]
        schedule = self._schedule(len(inputs), inputs[0].tokens.shape)
        tokens = (torch.cat([one.tokens for one in inputs]),) if 0 in self.stages else ()
        unused = torch.zeros(len(inputs)) if self.last in self.stages else None  # targets are among the inputs
        schedule.step(*tokens, target=unused, return_outputs=False)
        return self._sums

    def forward(self, inputs: ModelInputs, **options: object) -> Tensor | None:
        """Stage by stage. A rank returns as soon as its own stages are done, so that batch follows batch."""
        layout, me = self.mesh.layout, self.mesh.coordinate["pipeline"]
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
        b = inputs.to(self.mesh.device, self.mesh.compute_dtype)
        x = b.tokens
        for stage, part in zip(self.stages, self.parts, strict=True):
            if stage > 0 and layout.rank_of_stage(stage - 1) != me:
                x = self._hidden(part, b.tokens.shape, self.mesh.device)
                dist.recv(x, group=self.group, group_src=layout.rank_of_stage(stage - 1))
            x = part(x, b.structure, b.positions, b.targets, **options)
            if stage < self.last and layout.rank_of_stage(stage + 1) != me:
                hidden = x.contiguous()
                to = layout.rank_of_stage(stage + 1)
                self._sending.append((dist.isend(hidden, group=self.group, group_dst=to), hidden))
        return x if self.last in self.stages else None

    def _connect(self) -> None:
        """Make the communicators of this group now, and those of two neighbours. Collective.

        NCCL makes each at its first use, where both ends wait for each other. Schedules send in batches, over the
        group's own; evaluation, and torch before a schedule's first step, send one by one, over those of two ranks.
        Every rank takes the pairs in one order, so that none waits for one that waits for it.
        """
        me, rank_of = self.mesh.coordinate["pipeline"], self.mesh.layout.rank_of_stage
        token = torch.zeros(1, device=self.mesh.device)
        dist.all_reduce(token, group=self.group)
        neighbours = {frozenset((rank_of(stage), rank_of(stage + 1))) for stage in range(self.last)}
        for one, other in sorted(sorted(pair) for pair in neighbours if len(pair) == 2):
            if me == one:
                dist.send(token, group=self.group, group_dst=other)
            elif me == other:
                dist.recv(token, group=self.group, group_src=one)

    def _schedule(self, count: int, shape: torch.Size) -> Any:
        """The schedule for `count` micro-batches of tokens [B, T / context]; the last one is kept."""
        if (count, shape) not in self._schedules:
            self._schedules.clear()  # it has a buffer for every micro-batch
            name = self.mesh.layout.schedule
            stages = [self._stage(stage, part, shape) for stage, part in zip(self.stages, self.parts, strict=True)]
            kind, over = (ONE_STAGE[name], stages[0]) if name in ONE_STAGE else (MANY_STAGES[name], stages)
            # Sums, not means: the one division is in the objective.
            self._schedules[count, shape] = kind(over, count, loss_fn=self._objective, scale_grads=False)
        return self._schedules[count, shape]

    def _stage(self, stage: int, part: Transformer, shape: torch.Size) -> PipelineStage:
        """Shapes are given: torch would infer them with a forward pass, again after each evaluation."""
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
        self._sums.append(torch.stack([loss.detach(), z_loss.detach()]))
        return objective / self._divisor

    def _hidden(self, part: Transformer, shape: torch.Size, device: Any) -> Tensor:
        """An empty tensor for the hidden states that go from stage to stage: this rank's share of the tokens."""
        size = shape[0], shape[1] // self.mesh.layout.tensor, part.cfg.d_model
        return torch.empty(size, dtype=self.mesh.compute_dtype, device=device)

    def _hand_inputs_to(self, index: int, part: Transformer) -> None:
        """Called with hidden states alone, as a schedule does, the part takes its other inputs from the step's.

        Every schedule takes the micro-batches through a stage in order.
        """
        forward: Any = part.forward

        def with_inputs(x: Tensor, *given: Any, **options: Any) -> Any:
            if given:
                return forward(x, *given, **options)
            b = next(self._inputs[index])
            found = forward(x, b.structure, b.positions, b.targets)
            return tuple(found) if isinstance(found, HeadSums) else found  # schedules know tuples only

        part.forward = with_inputs  # type: ignore[method-assign,assignment]


class _WholeBackward(PipelineStage):
    """Under recomputation a split backward would run each block's forward again for every group of weights."""

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward=True, last_backward=last_backward)

    def backward_weight_one_chunk(self, *args: Any, **options: Any) -> None:
        return
