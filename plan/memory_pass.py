"""What a pass of a pipeline stage does to the bytes of its rank: at moments within it, and after it."""

from collections.abc import Mapping
from typing import NamedTuple

from minka.plan.layout import Layout
from minka.plan.memory_stage import Stage
from minka.plan.pipeline_passes import Pass

Bytes = dict[str, int]  # by kind
NOTHING: Bytes = {}


class Change(NamedTuple):
    """Bytes beyond those before the pass."""

    moments: Mapping[str, Bytes]
    after: Bytes


class StageState(NamedTuple):
    """Of a stage, between two passes.

    gathered, rooted: FSDP's whole weights of its blocks are there, and those of the rest. gradients, late: there are
    sums of gradients, and of those that a pass over weights makes last. waiting: such a pass has left its last ones in
    the compute dtype, next to their sums.
    """

    gathered: bool = False
    rooted: bool = False
    gradients: bool = False
    late: bool = False
    waiting: bool = False


class StagePasses:
    """The passes of a stage in a step of `count` micro-batches, and what it has before the first one."""

    def __init__(self, layout: Layout, index: int, stage: Stage, count: int) -> None:
        self.layout, self.index, self.stage, self.count = layout, index, stage, count
        self.block, self.first, self.last = stage.block, stage.first, stage.last
        here = layout.rank_of_stage(index)  # hidden states go from stage to stage on one rank without a copy
        self.local_in = not self.first and layout.rank_of_stage(index - 1) == here
        self.local_out = not self.last and layout.rank_of_stage(index + 1) == here
        self.several = layout.stage_count > layout.pipeline
        self.split = layout.splits_backward and layout.recompute == "none"  # else whole, in the pass over inputs
        b = self.block
        self.sums = b.g if b.fsdp else b.w  # bytes of an element
        self.rounded = b.fsdp and b.c < b.g  # gradients are made in another dtype than their sums
        self.late = stage.ends if self.last else 3 * b.d * b.f  # elements that a pass over weights makes last
        self.rows = b.tokens * b.d * b.c  # hidden states of all of a tensor group's tokens

    def before(self) -> Bytes:
        """Weights, moments and buffers."""
        b, s, count = self.block, self.stage, self.count
        tokens = count * b.tokens * 8
        of_rank = self.index < self.layout.pipeline  # one of its stages has the inputs of all
        return {
            "weights": s.shards * b.w,
            "optimizer": 2 * s.shards * b.m,
            "activations": count * b.mask() * of_rank + (tokens if self.first else count * b.hidden),
            "workspace": 4 * tokens * of_rank + (0 if self.last else count * b.hidden),
        }

    def change(self, one: Pass, state: StageState) -> tuple[Change, StageState]:
        """What a pass from this state changes, and the stage's next state."""
        if one.kind == "forward":
            return self._forward(state)
        if one.kind == "reduce":
            return self._reduce(state), StageState()
        if one.kind in ("gather", "free"):
            return self._gather_all(state) if one.kind == "gather" else self._free_all(state)
        over_inputs, over_weights = one.kind == "backward_inputs", one.kind == "backward_weights"
        if (over_inputs and self.split and self.first) or (over_weights and not self.split):
            return Change({"backward": NOTHING}, NOTHING), state
        if over_inputs and self.split:
            return self._backward_inputs(state)
        if over_weights and not self.first:
            return self._backward_weights(state)
        return self._backward(state)

    def _gathering(self, state: StageState) -> int:
        """Bytes of whole weights that a pass from this state gathers."""
        s, blocks = self.stage, self.stage.size - self.stage.root
        missing = (0 if state.rooted else s.root) + (0 if state.gathered else blocks)
        return missing * self.block.c if self.block.fsdp else 0

    def _gather_all(self, state: StageState) -> tuple[Change, StageState]:
        after = {"gathered": self._gathering(state)}
        arrives = {"gathered": self.stage.buffer if after["gathered"] else 0}
        return Change({"gather": add(after, arrives)}, after), state._replace(gathered=True, rooted=True)

    def _free_all(self, state: StageState) -> tuple[Change, StageState]:
        freed = state._replace(gathered=False, rooted=False)
        return Change({"free": NOTHING}, {"gathered": self._gathering(state) - self._gathering(freed)}), freed

    def _saved(self) -> Bytes:
        """What a forward pass leaves for backward. The first block's input is in the buffer it was received in."""
        b, s = self.block, self.stage
        found = {"activations": s.layers * b.saved() + b.angles(), "gathered": s.layers * b.kept_rows()}
        if not self.first:
            found["activations"] -= b.hidden
        if self.last:
            found["activations"] += b.hidden + b.own * 4
            return found | {"gradients": s.matrix * b.g + self.rows}
        return found | {"workspace": 0 if self.local_out else b.hidden}

    def _freed(self) -> Bytes:
        """The same, taken away by backward. A schedule of several stages keeps what it sent."""
        sent = self.block.hidden if self.several and not self.last and not self.local_out else 0
        return add(negative(self._saved()), {"workspace": sent})

    def _forward(self, state: StageState) -> tuple[Change, StageState]:
        b, s = self.block, self.stage
        gathers, freed = self._gathering(state), (s.size - s.root) * b.c if b.fsdp and not s.kept else 0
        after = add(self._saved(), {"gathered": gathers - freed})
        buffer, whole_rows = s.buffer if gathers else 0, self.rows if self.layout.tensor > 1 else 0
        if self.last:
            logits = {"logits": b.logits(), "workspace": 2 * b.hidden, "gathered": whole_rows + buffer}
            moments = {"loss": add(after, logits)}
        else:
            sum_ = {"workspace": b.hidden * (1 + self.local_out) + whole_rows, "gathered": buffer}
            moments = {"forward": add(after, sum_)}
        return Change(moments, after), state._replace(gathered=s.kept, rooted=True)

    def _new_gradients(self, state: StageState, *, waits: bool = False) -> int:
        """Bytes of gradients that a pass from this state adds; waits: the last ones are not summed yet."""
        b, s = self.block, self.stage
        found = 0 if state.gradients else (s.size - self.late) * self.sums
        if state.waiting or not waits:
            found += 0 if state.late else self.late * self.sums
        return found + self.late * b.c * (waits - state.waiting)

    def _input_gradient(self, state: StageState) -> int:
        """Bytes of what is sent back, kept until the end of the step; by 1F1B until the next one."""
        if self.first or self.local_in or (self.layout.schedule == "1f1b" and state.gradients):
            return 0
        return self.block.hidden

    def _head(self) -> Bytes:
        """Gradients of the head and of its input, multiplied by that of the objective, and rounded."""
        b, matrix = self.block, self.stage.matrix
        return {"workspace": matrix * b.g + self.rows, "gradients": matrix * b.c * (b.c < b.g)}

    def _backward(self, state: StageState) -> tuple[Change, StageState]:
        """Of inputs and weights in one pass."""
        s, gathers = self.stage, self._gathering(state)
        made = {"gradients": self._new_gradients(state), "workspace": self._input_gradient(state), "gathered": gathers}
        after = add(self._freed(), made)
        moments = {}
        if self.last:
            moments["head"] = add(self._head(), {"gathered": s.buffer if gathers else 0})
        unit = (s.unit or s.layers) if self.rounded else 1
        for done in {0, unit - 1, s.layers - unit, s.layers - 1}:
            start, end, sums = self._backward_of_block(state, done, unit)
            moments[f"backward of block {s.layers - done}"] = max(start, end, key=lambda one: sum(one.values()))
            if (done + 1) % unit == 0 or done == s.layers - 1:
                moments[f"gradients of block {s.layers - done}"] = sums
        if self.first:
            moments["embedding"] = add(after, self._embedding(state))
        return Change(moments, after), StageState(gathered=True, rooted=True, gradients=True, late=True)

    def _backward_of_block(self, state: StageState, done: int, unit: int) -> tuple[Bytes, Bytes, Bytes]:
        """After `done` blocks, the last ones: in its last product, after its feed-forward layer, and after all of it.

        FSDP adds up gradients when those of a unit are complete.
        """
        b, s = self.block, self.stage
        matrix, wide = b.d * b.f * b.c, b.tokens * b.f * b.c
        new, units, rest = not state.gradients, done // unit, done % unit
        kept = self.rounded or new
        made = (units * unit * b.g * new + rest * b.c) * b.size if self.rounded else done * b.size * b.c * new
        if self.last:
            made += (s.matrix * b.c if kept else 0) - (s.matrix * b.g + self.rows)
        gathered = min(self._gathering(state), (2 + units) * s.unit_bytes)
        before = {
            "gradients": made,
            "activations": b.recomputed() - done * b.saved() - (b.hidden + b.own * 4) * self.last,
            "gathered": gathered + b.gathered_rows() - (1 + done) * b.kept_rows(),
            "workspace": b.hidden if done or self.last else 0,
        }
        start = {"gradients": matrix * kept, "activations": -wide, "workspace": 4 * wide}
        end = {
            "gradients": 3 * matrix * kept,
            "activations": -3 * wide,
            "workspace": wide + 2 * self.rows + matrix * (not kept),
        }
        sums = {
            "gradients": made + b.size * b.c * kept,
            "activations": -(1 + done) * b.saved(),
            "gathered": gathered - (1 + done) * b.kept_rows(),
            "workspace": 2 * b.hidden,
        }
        return add(before, start), add(before, end), sums

    def _embedding(self, state: StageState) -> Bytes:
        """After the pass, and its last gradient. Its first sums are made from rounded gradients, that of the embedding
        before the rest of its unit."""
        b, s = self.block, self.stage
        rows = b.hidden + (self.rows if self.layout.tensor > 1 else b.hidden)
        if self.rounded and not state.gradients:
            return {"gradients": s.root * (b.c - b.g) + s.matrix * b.g, "workspace": 0 if self.several else b.hidden}
        if self.rounded:
            return {"gradients": s.root * b.c, "workspace": rows}
        return {"workspace": rows + (s.matrix * b.c if state.gradients else 0)}

    def _kept(self) -> Bytes:
        """Gradients of the outputs of products and norms, from the pass over inputs to the one over weights."""
        b, layers = self.block, self.stage.layers
        widths = 2 * b.f + b.q + 2 * b.kv + (b.q + b.kv if b.model.qk_norm else 0)
        kept = layers * (b.tokens * widths * b.c + 4 * b.hidden)
        gathered = 2 * layers * self.rows if self.layout.tensor > 1 else 0
        ends = b.hidden if self.last else -b.hidden if self.layout.tensor == 1 else -2 * b.hidden
        return {"workspace": kept + ends, "gathered": gathered}

    def _backward_inputs(self, state: StageState) -> tuple[Change, StageState]:
        """Frees nothing but gradients that were waiting, which are summed here."""
        b, qk_norm = self.block, self.block.model.qk_norm
        summed = state._replace(waiting=False, late=True) if state.waiting else state
        kept = add(self._kept(), {"gradients": self._new_gradients(state) - self._new_gradients(summed)})
        after = add(kept, {"workspace": self._input_gradient(state)})
        # In the first block: of the inputs of three products, or of the queries' rotation, in fp32.
        rotation = b.tokens * b.q * (12 if b.c < 4 else 2 * b.c)
        rotation -= b.hidden + b.tokens * (b.q + b.kv) * b.c * qk_norm
        moments = {"backward of inputs": add(kept, {"workspace": max(3 * self.rows, rotation)})}
        if self.last:  # both are dropped: the pass over weights makes them again
            moments["head"] = {"workspace": sum(self._head().values())}
        return Change(moments, after), summed

    def _backward_weights(self, state: StageState) -> tuple[Change, StageState]:
        """Frees inputs of products one by one, and at the end what only the pass over inputs has used."""
        b, s = self.block, self.stage
        kept = negative(self._kept())
        inputs = b.tokens * (b.f + b.q + (b.q + b.kv if b.model.qk_norm else 0)) * b.c + 4 * b.hidden
        left = add(kept, {"activations": b.hidden - s.layers * inputs, "gathered": -s.layers * b.kept_rows()})
        added = {"gradients": self._new_gradients(state, waits=self.rounded)}
        moments = {"backward of weights": add(left, added)}
        if self.last:  # its head comes after the blocks; the last products before it are not summed yet
            blocks = self._new_gradients(state._replace(late=True, waiting=False))
            unsummed = 3 * b.d * b.f * (b.c if state.gradients else b.c - b.g) * self.rounded
            moments["head"] = add(left, self._head(), {"gradients": blocks + unsummed})
        after = add(self._freed(), kept, added)
        late = state.late or state.waiting or not self.rounded
        return Change(moments, after), state._replace(waiting=self.rounded, gradients=True, late=late)

    def _reduce(self, state: StageState) -> Change:
        """Of embedding and head first, then unit by unit. What GPipe sent back has arrived."""
        b, s = self.block, self.stage
        if not b.fsdp:
            return Change({"reduction": NOTHING}, NOTHING)
        left = 0 if self.several or self.last else b.hidden  # the last output, in a variable of the schedule
        sent = (self.count - 1) * b.hidden if self.layout.schedule == "gpipe" and not self.first else 0
        added = self._new_gradients(state)
        summed = {"gradients": added if self.last else max(added, 0), "workspace": left - sent}
        moments = {"reduction": summed}
        if s.root:
            last = s.matrix if s.units else b.d * b.f
            moments["reduction"] = add(summed, self._reduction(s.root, s.root_shards, last))
        if s.units:
            reduced = {"gradients": s.root_shards * b.w - s.root * b.g, "gathered": -s.root * b.c}
            of_unit = self._reduction(s.unit * b.size, s.unit * b.shards, b.d * b.f)
            moments["reduction of blocks"] = add(summed, reduced, of_unit)
        shards = {"gradients": added + s.shards * b.w - s.size * b.g, "gathered": -s.size * b.c, "workspace": -sent}
        return Change(moments, shards)

    def _reduction(self, size: int, shards: int, last: int) -> Bytes:
        """Of `size` elements: a copy of all; then shards, next to the copy and the last of its tensors."""
        b = self.block
        copy, again = size * b.g, size * b.g if b.data == 1 else 0
        made = (shards + last) * b.g + max(again, shards * b.w * (b.w < b.g))
        return {"gradients": max(copy, made), "gathered": -size * b.c}


def add(*several: Bytes) -> Bytes:
    """The sum of bytes by kind."""
    found: Bytes = {}
    for by_kind in several:
        for kind, size in by_kind.items():
            found[kind] = found.get(kind, 0) + size
    return found


def negative(by_kind: Bytes) -> Bytes:
    """As many bytes of each kind less."""
    return {kind: -size for kind, size in by_kind.items()}
