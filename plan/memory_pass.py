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
    """Of a stage, between two passes. Of a split backward the gradients that come last wait for a later pass.

    gathered, rooted: FSDP's whole weights of its blocks, and of the rest. gradients, late: there are sums of most
    gradients, and of those that come last. waiting: some of these are still in the compute dtype, next to their sums.
    """

    gathered: bool = False
    rooted: bool = False
    gradients: bool = False
    late: bool = False
    waiting: bool = False


class StagePasses:
    """The passes of a stage, and what it has before the first one."""

    def __init__(self, layout: Layout, index: int, stage: Stage, count: int) -> None:
        self.layout, self.index, self.stage, self.block, self.count = layout, index, stage, stage.block, count
        self.first, self.last = index == 0, index == layout.stage_count - 1
        here = layout.rank_of_stage(index)  # hidden states go from stage to stage on one rank without a copy
        self.local_in = not self.first and layout.rank_of_stage(index - 1) == here
        self.local_out = not self.last and layout.rank_of_stage(index + 1) == here
        self.several = layout.stage_count > layout.pipeline
        self.split = layout.splits_backward and layout.recompute == "none"
        self.late = stage.ends if self.last else 3 * stage.block.d * stage.block.f  # elements
        self.rounds = self.block.fsdp and self.block.c < self.block.g  # gradients are added up in a wider dtype

    def before(self) -> Counter[str]:
        """Weights, moments, and a stage's buffers; schedules of several stages have gathered the weights."""
        b, s, count = self.block, self.stage, self.count
        tokens = count * b.tokens * 8
        inputs = 4 * tokens if self.index < self.layout.pipeline else 0  # of all stages of the rank
        return Counter(
            weights=s.shards * b.w,
            optimizer=2 * s.shards * b.m,
            activations=count * b.mask() * bool(inputs) + (tokens if self.first else count * b.hidden),
            gathered=s.size * b.c if self.several and b.fsdp else 0,
            workspace=inputs + (0 if self.last else count * b.hidden),
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
        gathers, hidden = self._gathering(state), b.tokens * b.d * b.c
        freed = (s.size - s.root) * b.c if b.fsdp and not s.kept else 0
        after = _add(self._saved(), gathered=gathers - freed)
        buffer = s.buffer if gathers else 0
        together = hidden if self.layout.tensor > 1 else 0
        if self.last:
            rows = min(b.tokens, logit_rows(b.vocab, "cuda"))
            logits = rows * b.vocab * (4 + b.c if b.c < 4 else b.c)
            moment = _add(after, logits=logits, workspace=2 * b.hidden, gathered=together + buffer)
        else:
            sent = b.hidden if self.local_out else 0
            moment = _add(after, workspace=b.hidden + together + sent, gathered=buffer)
        moments = {"loss" if self.last else "forward": moment}
        return Change(moments, after), state._replace(gathered=s.kept, rooted=True)

    def _new_gradients(self, state: State, *, waits: bool = False) -> int:
        """Bytes of gradients that a pass from this state adds; waits: those that come last are not summed yet."""
        b, s = self.block, self.stage
        wide = b.g if b.fsdp else b.w
        found = 0 if state.gradients else (s.size - self.late) * wide
        if state.waiting or not waits:
            found += 0 if state.late else self.late * wide
        return found + self.late * b.c * (waits - state.waiting)

    def _input_gradient(self, state: State) -> int:
        """Bytes of what is sent back, kept until the end of the step; by 1F1B until the next one."""
        if self.first or self.local_in or (self.layout.schedule == "1f1b" and state.gradients):
            return 0
        return self.block.hidden

    def _backward(self, state: State) -> tuple[Change, State]:
        """Whole: of inputs and weights."""
        b, s = self.block, self.stage
        gathers, matrix = self._gathering(state), s.matrix * b.c
        after = _add(
            self._freed(),
            gradients=self._new_gradients(state),
            gathered=gathers,
            workspace=self._input_gradient(state),
        )
        moments = {}
        if self.last:
            buffer = s.buffer if gathers else 0
            moments["head"] = Counter(gradients=matrix * (b.c < b.g), workspace=self._head(), gathered=buffer)
        unit = (s.unit or s.layers) if self.rounds else 1
        for done in {0, unit - 1, s.layers - unit, s.layers - 1}:
            moments[f"backward of block {s.layers - done}"] = self._backward_of_block(state, done, unit)
        if self.first:
            moments["embedding"] = self._embedding(state, after)
        return Change(moments, after), State(gathered=True, rooted=True, gradients=True, late=True)

    def _head(self) -> int:
        """Gradients of the head and of its input, multiplied by that of the objective."""
        return self.stage.matrix * self.block.g + self.block.tokens * self.block.d * self.block.c

    def _backward_of_block(self, state: State, done: int, unit: int) -> Counter[str]:
        """After `done` blocks, the last ones. FSDP adds up gradients when those of a unit are complete."""
        b, s = self.block, self.stage
        whole, rest = divmod(done, unit)
        gathers, new = self._gathering(state), not state.gradients
        gradients = b.d * b.f * b.c
        if self.rounds:
            gradients += (whole * unit * b.g * new + rest * b.c) * b.size
        elif new:
            gradients += done * b.size * b.c
        if self.last:
            gradients += (s.matrix * b.c if self.rounds or new else 0) - self._head()
        gathered = min(gathers, (2 + whole) * s.unit_bytes) + b.gathered_rows() - b.kept_rows()
        return Counter(
            gradients=gradients,
            activations=b.recomputed() - b.tokens * b.f * b.c - done * b.saved(),
            gathered=gathered - done * b.kept_rows(),
            workspace=4 * b.tokens * b.f * b.c + (b.hidden if done or self.last else 0),
        )

    def _embedding(self, state: State, after: Counter[str]) -> Counter[str]:
        """The last gradient of the first stage. Under FSDP the first ones are rounded sums, while it is whole."""
        b, s = self.block, self.stage
        hidden = b.hidden + (b.hidden if b.layout.tensor == 1 else b.tokens * b.d * b.c)
        if self.rounds:
            if state.gradients:
                return _add(after, gradients=s.root * b.c, workspace=hidden)
            return _add(after, gradients=s.root * (b.c - b.g) + s.matrix * b.g)
        return _add(after, gradients=s.matrix * b.c if state.gradients else 0, workspace=hidden)

    def _kept_gradients(self) -> Counter[str]:
        """Those of the outputs of a block's products and norms, from the pass over inputs to that over weights."""
        b, n = self.block, self.stage.layers
        widths = 2 * b.f + b.q + 2 * b.kv + (b.q + b.kv if b.model.qk_norm else 0)
        kept = n * (b.tokens * widths * b.c + 4 * b.hidden)
        if self.last:
            return Counter(workspace=kept + b.hidden)
        if self.layout.tensor == 1:
            return Counter(workspace=kept - b.hidden)
        return Counter(workspace=kept - 2 * b.hidden, gathered=2 * n * b.tokens * b.d * b.c)

    def _backward_inputs(self, state: State) -> tuple[Change, State]:
        """Of all stages but the first, which does all of backward in its pass over weights."""
        b, s = self.block, self.stage
        if self.first:
            return Change({"backward of inputs": Counter()}, Counter()), state
        ended = state._replace(waiting=False, late=True) if state.waiting and self.last else state
        added = self._new_gradients(state) - self._new_gradients(ended)
        after = _add(self._kept_gradients(), gradients=added, **{})
        after = _add(after, workspace=self._input_gradient(state))
        moments = {"backward of inputs": _add(after, workspace=2 * b.tokens * b.f * b.c)}
        if self.last:
            moments["head"] = Counter(workspace=self._head() + s.matrix * b.c * (b.c < b.g))
        return Change(moments, after), ended

    def _backward_weights(self, state: State) -> tuple[Change, State]:
        """Tensors are freed one by one, but for those that only the pass over inputs has used."""
        b, s = self.block, self.stage
        added = self._new_gradients(state, waits=self.rounds)
        kept = self._kept_gradients()
        after = _add(self._freed(), gradients=added, **{kind: -size for kind, size in kept.items()})
        used = b.f + b.q + (b.q + b.kv if b.model.qk_norm else 0)
        used_bytes = s.layers * (b.tokens * used * b.c + 4 * b.hidden) - b.hidden
        left = Counter({kind: -size for kind, size in kept.items()})
        left = _add(left, activations=-used_bytes, gathered=-s.layers * b.kept_rows())
        moments = {"backward of weights": _add(left, gradients=added)}
        if self.last:
            early = self._new_gradients(state._replace(late=True, waiting=False))
            mlp = 3 * b.d * b.f
            pending = mlp * b.c if state.gradients else -mlp * (b.g - b.c)
            head = _add(left, gradients=early + pending * self.rounds + s.matrix * b.c * (b.c < b.g))
            moments["head"] = _add(head, workspace=self._head())
        state = state._replace(waiting=self.rounds, gradients=True, late=state.late or state.waiting or not self.rounds)
        return Change(moments, after), state

    def _reduce(self, state: State) -> Change:
        """Of embedding and head first, then unit by unit. What was sent back has arrived."""
        b, s = self.block, self.stage
        if not b.fsdp:
            return Change({"reduction": Counter()}, Counter())
        waits = self._new_gradients(state)
        after = Counter(gradients=s.shards * b.w - s.size * b.g + waits, gathered=-s.size * b.c)
        if self.layout.schedule == "gpipe" and not self.first:
            waits_sent = -(self.count - 1) * b.hidden
            after = _add(after, workspace=waits_sent)
        moments = {}
        root_last = s.matrix if self.first or self.last else 0
        done = Counter(gradients=waits + s.root_shards * b.w - s.root * b.g, gathered=-s.root * b.c)
        if s.root:
            moments["reduction"] = self._reduction(
                Counter(gradients=waits), s.root, s.root_shards, root_last if s.units else b.d * b.f
            )
        if s.units:
            moments["reduction of a block"] = self._reduction(
                done, s.unit * b.size, s.unit * b.shards, b.d * b.f
            )
        return Change(moments, after)

    def _reduction(self, before: Counter[str], size: int, shards: int, last: int) -> Counter[str]:
        """Of `size` elements: copied together; then whole ones are freed but for the last, and shards are made."""
        b = self.block
        copied = size * b.g
        reduced = shards * (b.g + b.w * (b.w < b.g)) + last * b.g + (copied if b.data == 1 else 0)
        return _add(before, gradients=max(copied, reduced), gathered=-size * b.c)


def _add(one: Counter[str], **more: int) -> Counter[str]:
    found = Counter(one)
    found.update(more)
    return found
