"""What a pass of a pipeline stage does to the bytes of its rank: at moments within it, and after it."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from minka.plan.execution_choices import logit_rows
from minka.plan.layout import Layout
from minka.plan.memory_stage import Stage
from minka.plan.pipeline_passes import Pass


class Change(NamedTuple):
    """Bytes by kind beyond those before the pass."""

    moments: Mapping[str, Counter[str]]
    after: Counter[str]


class State(NamedTuple):
    """Of a stage, between two passes."""

    gathered: bool = False  # FSDP's whole weights of its blocks
    rooted: bool = False  # and of the rest
    gradients: bool = False  # its blocks have some
    ends: bool = False  # embedding and head have
    waiting: bool = False  # those of the head from a split backward, which are added up in the next pass


class StagePasses:
    """The passes of a stage, and what it has before the first one."""

    def __init__(self, layout: Layout, index: int, stage: Stage) -> None:
        self.layout, self.index, self.stage, self.block = layout, index, stage, stage.block
        self.first, self.last = index == 0, index == layout.stage_count - 1
        here = layout.rank_of_stage(index)  # hidden states go from stage to stage on one rank without a copy
        self.local_in = not self.first and layout.rank_of_stage(index - 1) == here
        self.local_out = not self.last and layout.rank_of_stage(index + 1) == here
        self.several = layout.stage_count > layout.pipeline
        self.split = layout.splits_backward and layout.recompute == "none"
        self.rounds = self.block.fsdp and self.block.c < self.block.g  # gradients are added up in a wider dtype

    def before(self, count: int) -> Counter[str]:
        """With `count` micro-batches in the step; schedules of several stages gather weights before the first one."""
        b, s = self.block, self.stage
        ids = count * b.tokens * 8
        of_rank = 4 * ids * (self.index == self.layout.rank_of_stage(self.index))  # counted with its first stage
        whole = s.size * b.c if self.several and b.fsdp else 0
        return Counter(
            weights=s.shards * b.w,
            optimizer=2 * s.shards * b.m,
            activations=count * (b.mask() * bool(of_rank) + (ids and 0) + (0 if self.first else b.hidden)),
            gathered=whole,
            workspace=of_rank + (0 if self.last else count * b.hidden),
        )

    def change(self, one: Pass, state: State) -> tuple[Change, State]:
        """What a pass from this state changes, and the stage's next state."""
        if one.kind == "forward":
            return self._forward(state)
        if one.kind == "reduce":
            return self._reduce(state), state
        if one.kind == "backward" or (one.kind == "backward_inputs" and not self.split):
            return self._backward(state)
        if one.kind == "backward_inputs":
            return self._backward_inputs(state)
        if not self.split:
            return Change({"backward": Counter()}, Counter()), state
        return self._backward(state) if self.first else self._backward_weights(state)

    def _gathering(self, state: State) -> int:
        """Bytes of whole weights that a pass from this state gathers."""
        if not self.block.fsdp:
            return 0
        blocks = self.stage.size - self.stage.root
        return ((0 if state.rooted else self.stage.root) + (0 if state.gathered else blocks)) * self.block.c

    def _saved(self) -> Counter[str]:
        """What a forward pass leaves for backward. The first block's input is in the buffer it was received in."""
        b, s = self.block, self.stage
        activations = s.layers * b.saved() - (0 if self.first else b.hidden) + b.angles()
        found = Counter(activations=activations, gathered=s.layers * b.kept_rows())
        if self.last:
            found.update(activations=b.hidden + b.own * 4, gradients=s.matrix * b.g + b.tokens * b.d * b.c)
        elif not self.local_out:
            found.update(workspace=b.hidden)
        return found

    def _freed(self) -> Counter[str]:
        """What backward takes away again. A schedule of several stages keeps what it sent."""
        sent = self.block.hidden if self.several and not self.last and not self.local_out else 0
        return _add(Counter({kind: -size for kind, size in self._saved().items()}), workspace=sent)

    def _forward(self, state: State) -> tuple[Change, State]:
        b, s = self.block, self.stage
        gathers, blocks = self._gathering(state), (s.size - s.root) * b.c if b.fsdp else 0
        most = _add(self._saved(), gathered=gathers)
        frees = 0 if s.kept else blocks
        after = _add(most, gathered=-frees)
        hidden = b.tokens * b.d * b.c
        moments = {}
        if self.last:
            rows = min(b.tokens, logit_rows(b.vocab, "cuda"))
            logits = rows * b.vocab * (4 + b.c if b.c < 4 else b.c)
            gathered = hidden if self.layout.tensor > 1 else 0
            moments["loss"] = _add(after, logits=logits, workspace=2 * b.hidden, gathered=gathered)
        else:
            moments["forward"] = _add(after, workspace=b.hidden * (2 if self.local_out else 1))
        if gathers > blocks * state.gathered:
            fewer = s.unit * b.saved()
            moments["forward, gathering"] = _add(after, activations=-fewer, gathered=s.unit_bytes)
        if self.layout.recompute != "none":
            within = b.tokens * b.f * b.c * (3 if self.layout.recompute == "block" else 1) + 2 * hidden
            moments["forward of a block"] = _add(
                self._saved() if self.last else after,
                workspace=within,
                gradients=-(s.matrix * b.g + hidden) if self.last else 0,
                gathered=frees and s.unit * b.size * b.c,
            )
        return Change(moments, after), state._replace(gathered=s.kept, rooted=True)

    def _new_gradients(self, state: State) -> int:
        """Bytes of whole gradients that a pass from this state makes, in the dtype in which they are added up."""
        b, s = self.block, self.stage
        size = (0 if state.gradients else s.size - s.ends) + (0 if state.ends else s.ends)
        return size * (b.g if b.fsdp else b.w) - s.ends * b.c * state.waiting

    def _input_gradient(self, state: State) -> int:
        """Bytes of what is sent back, kept until the end of the step; by 1F1B until the next one."""
        if self.first or self.local_in or (self.layout.schedule == "1f1b" and state.gradients):
            return 0
        return self.block.hidden

    def _backward(self, state: State) -> tuple[Change, State]:
        b, s = self.block, self.stage
        hidden, matrix = b.tokens * b.d * b.c, s.matrix
        gathers = self._gathering(state)
        added = self._new_gradients(state)
        after = self._freed()
        after = _add(after, gradients=added, gathered=gathers, workspace=self._input_gradient(state))
        moments, own_head, head = {}, 0, 0
        if self.last:
            head = matrix * b.g + hidden
            own_head = matrix * b.c if self.rounds or not state.gradients else 0
            moments["head"] = Counter(gradients=matrix * b.c * (b.c < b.g), workspace=matrix * b.g + hidden)
        moments["backward"] = Counter(
            gradients=b.hidden * self.last + b.d * b.f * b.c + own_head - head,
            activations=b.recomputed() - b.tokens * b.f * b.c,
            gathered=min(gathers, 2 * s.unit_bytes),
            workspace=4 * b.tokens * b.f * b.c + hidden,
        )
        unit = (s.unit or s.layers) * b.size * b.c if self.rounds else b.d * b.f * b.c
        moments["gradients"] = _add(after, gradients=own_head + unit, workspace=2 * b.hidden)
        if self.first:
            whole = matrix * b.c if self.rounds or state.gradients else 0
            moments["embedding"] = _add(after, gradients=whole, workspace=2 * b.hidden)
        return Change(moments, after), State(gathered=True, rooted=True, gradients=True, ends=True)

    def _kept_gradients(self) -> int:
        """Of a block's and the last norm's outputs, from the pass over inputs to that over weights."""
        b = self.block
        widths = 2 * b.f + b.q + 2 * b.kv + (b.q + b.kv if b.model.qk_norm else 0)
        return self.stage.layers * (b.tokens * widths * b.c + 4 * b.hidden) + (b.hidden if self.last else 0)

    def _backward_inputs(self, state: State) -> tuple[Change, State]:
        b, s = self.block, self.stage
        if self.first:
            return Change({"backward": Counter()}, Counter()), state
        hidden = b.tokens * b.d * b.c
        ended = state._replace(waiting=False, ends=state.ends or state.waiting)
        added = self._new_gradients(state) - self._new_gradients(ended)
        after = Counter(workspace=self._kept_gradients() + self._input_gradient(state), gradients=added)
        moments = {"backward": _add(after, workspace=2 * b.tokens * b.f * b.c)}
        if self.last:
            moments["head"] = Counter(workspace=s.matrix * (b.g + b.c * (b.c < b.g)) + hidden)
        return Change(moments, after), ended

    def _backward_weights(self, state: State) -> tuple[Change, State]:
        b, s = self.block, self.stage
        after = self._freed()
        waits = self.rounds and self.last
        added = self._new_gradients(state._replace(ends=True) if waits else state) + s.ends * b.c * waits
        after = _add(after, gradients=added, workspace=-self._kept_gradients())
        moments = {"weights": Counter(gradients=max(added, 0) + b.d * b.f * b.c)}
        if self.last:
            moments["head"] = Counter(
                gradients=s.matrix * b.c * (b.c < b.g), workspace=s.matrix * b.g + b.tokens * b.d * b.c
            )
        return Change(moments, after), state._replace(waiting=waits, gradients=True, ends=state.ends or not waits)

    def _reduce(self, state: State) -> Change:
        """Of embedding and head first, then unit by unit."""
        b, s = self.block, self.stage
        if not b.fsdp:
            return Change({"reduction": Counter()}, Counter())
        shards = b.g + (b.w if b.w < b.g else 0)
        waits = s.ends * b.c if state.waiting else 0
        after = Counter(gradients=s.shards * b.w - s.size * b.g - waits, gathered=-s.size * b.c)
        copies = 2 if b.data == 1 else 1
        root = Counter(gradients=s.root * b.g * copies + s.root_shards * shards - waits, gathered=-s.root * b.c)
        unit, ends = s.unit * b.size, s.size * 0
        unit_shards = s.unit * b.shards
        blocks = Counter(
            gradients=unit * b.g * copies + unit_shards * shards + s.root_shards * b.w - s.root * b.g - waits + ends,
            gathered=-(s.root + unit) * b.c,
        )
        return Change({"reduction": root, "reduction of a block": blocks}, after)


def _add(one: Counter[str], **more: int) -> Counter[str]:
    found = Counter(one)
    found.update(more)
    return found
