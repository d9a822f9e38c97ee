"""Memory of a rank at its peak, from numbers alone: what a dry run traces, in a millisecond and without torch.

Three moments of the last micro-batch can be the largest: its loss, where a chunk of logits exists next to every
activation; the backward pass of the last block, where its intermediates do; and the end of backward, where the largest
unit's gradients are whole, in the buffers they are reduced in, and reduced.
"""

from collections.abc import Iterator
from typing import NamedTuple

from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.execution_choices import compute_dtype_name, frees_gathered_weights, fsdp_units, logit_rows, needs_fsdp
from minka.plan.layout import Layout, micro_batches
from minka.plan.memory_kinds import MEMORY_KINDS

BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


class Matrix(NamedTuple):
    """One parameter as tensor parallelism leaves it on a rank."""

    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def shard(self, ways: int) -> int:
        """Elements of the first of `ways` shards, which FSDP cuts by rows: no rank has more."""
        return -(-self.rows // ways) * self.columns


class Memory(NamedTuple):
    """Bytes at a moment, and which one it is."""

    moment: str
    by_kind: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


def predict_memory(config: RunConfig, world: int) -> Memory:
    """The peak of the first of `world` ranks, which has the most, on a GPU with nothing compiled.

    Raises UserError for a layout that is not legal on them, and for a pipeline, DeepSpeed and offload.
    """
    layout = config.check(world)
    for key, value in (("engine", "deepspeed"), ("offload", "optimizer"), ("offload", "all")):
        if getattr(layout, key) == value:
            what, remedy = f"memory under {key}={value!r} is not predicted", "run it, or set the default"
            raise UserError(what, where=f"layout.{key}", why="what it holds where is its own", remedy=remedy)
    if layout.pipeline > 1:
        remedy = f"`minka train RUN --dry-run --world {world}` traces it"
        raise UserError("memory of a pipeline is not predicted yet", where="layout.pipeline", remedy=remedy)
    return max(_Rank(config, layout).moments(), key=lambda memory: memory.total)


class _Rank:
    """What the moments are made of."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        m, self.layout, self.model = config.model, layout, config.model
        precision = compute_dtype_name(layout, "cuda")
        self.c = BYTES[precision]  # of activations and gathered weights
        self.w = BYTES["fp64"] if precision == "fp64" else BYTES[config.optimizer.weights]
        self.m = BYTES["fp64"] if precision == "fp64" else BYTES[config.optimizer.moments]
        self.g = max(4, self.c)  # of gradients that are added up
        t, self.data = layout.tensor, layout.shard * layout.context
        self.fsdp = needs_fsdp(layout, casts=2 in (self.c, self.w))
        self.q, self.kv = m.heads * m.head_dim // t, m.kv_heads * m.head_dim // t
        self.f, self.vocab, self.heads, self.kv_heads = m.d_ff // t, m.vocab // t, m.heads // t, m.kv_heads // t
        d = m.d_model
        block = [Matrix(self.q, d), Matrix(self.kv, d), Matrix(self.kv, d), Matrix(d, self.q)]
        block += [Matrix(self.f, d), Matrix(self.f, d), Matrix(d, self.f), Matrix(d, 1), Matrix(d, 1)]
        block += [Matrix(m.head_dim, 1)] * 2 if m.qk_norm else []
        block += [Matrix(self.q, 1), Matrix(self.kv, 1), Matrix(self.kv, 1)] if m.qkv_bias else []
        self.block, self.root = block, [Matrix(self.vocab, d)] * (1 if m.tied else 2) + [Matrix(d, 1)]
        self.masked = self.c >= 4  # attention takes a mask, and on a GPU has no groups then
        self.attended = self.q if self.masked and self.kv < self.q else self.kv
        self.tokens = layout.micro_batch * config.data.seq_len // layout.context  # in attention and feed-forward
        self.own = self.tokens // t  # between them
        self.keys = layout.micro_batch * config.data.seq_len  # of attention
        if layout.context > 1:  # both chunks of the first rank: the first one's keys, and all
            self.keys = self.keys * (2 * layout.context + 1) // (2 * layout.context)
        self.micro_batches = max(micro_batches(layout, config.data))
        whole = sum(p.size for p in block) * self.c if t == 1 else self._whole_block() * self.c
        units = fsdp_units([whole] * m.layers) if self.fsdp else []
        self.units = [len(unit) for unit in units]
        self.kept = not frees_gathered_weights(layout, whole * m.layers)

    def _whole_block(self) -> int:
        t = self.layout.tensor
        return sum(p.size * (t if p.columns > 1 or p.rows in (self.q, self.kv) else 1) for p in self.block)

    def _sizes(self, parameters: list[Matrix]) -> int:
        return sum(p.size for p in parameters)

    def _shards(self, parameters: list[Matrix]) -> int:
        ways = self.data if self.fsdp else 1
        return sum(p.shard(ways) for p in parameters)

    def moments(self) -> Iterator[Memory]:
        layers, c, d, fixed = self.model.layers, self.c, self.model.d_model, self._fixed()
        saved = self._saved()
        later, step = self.micro_batches > 1, self.layout.reduce == "step"
        root, block, unit = self._sizes(self.root), self._sizes(self.block), max(self.units, default=self.model.layers)
        accumulated = 0
        if later and step and self.fsdp:
            accumulated = (root + layers * block) * self.g
        elif later:  # and the buffer that the root was reduced in, until the next reduction
            accumulated = self._all_shards() * self.w + (root * self.g if self.fsdp else 0)
        shared = 2 * self.tokens * self.model.head_dim * 4 + self.tokens * 16 + self._mask()
        gathered = self._gathered() + self._kept_rows()
        in_flight = unit * block * c if self.units and self.data > 1 else 0
        buffer = 0 if later and self.kept else in_flight
        rows = min(self.tokens, logit_rows(self.vocab, "cuda"))
        hidden = self.tokens * d * c
        loss = {
            "gradients": accumulated + self.vocab * d * self.g + hidden,
            "activations": layers * saved + self.own * (d * c + 4) + shared,
            "gathered": gathered + buffer + (hidden if self.layout.tensor > 1 else 0),
            "logits": rows * self.vocab * (4 + c if c < 4 else c),
            "workspace": 2 * self.own * d * c,
        }
        yield Memory("loss", {**fixed, **loss})
        # The head's gradient is multiplied by that of the objective, and rounded.
        rounded = self.vocab * d * c if c < self.g else 0
        head = {**loss, "gradients": loss["gradients"] + rounded, "logits": 0}
        head["gathered"] -= buffer if self.kept else 0
        yield Memory("head", {**fixed, **head, "workspace": self.vocab * d * self.g + self.own * d * c})
        within = self._recomputed()
        own_head = 0 if later and step and self.fsdp else self.vocab * d * c
        back = {
            "gradients": accumulated + self.own * d * c + own_head + d * self.f * c,
            "activations": layers * saved + within + shared - self.tokens * self.f * c,
            "gathered": gathered + (0 if self.kept else 2 * in_flight),
            "workspace": 4 * self.tokens * self.f * c + hidden,
        }
        yield Memory("backward", {**fixed, **back})
        if self.fsdp and layers > unit and not self.kept:  # the unit before is being reduced
            reducing = (0 if accumulated and step else unit * block * self.g) + unit * self._shards(self.block) * self.w
            fewer = {**back, "activations": back["activations"] - unit * saved}
            yield Memory("backward, reducing", {**fixed, **fewer, "gradients": back["gradients"] + reducing})
        yield Memory("reduction", {**fixed, "gradients": self._at_the_end(later=later and step)})

    def _at_the_end(self, *, later: bool) -> int:
        """Gradients while those of embedding and head are reduced, the last ones; later: they were added up whole."""
        root, shards = self._sizes(self.root), self._shards(self.root)
        blocks = self.model.layers * self._shards(self.block)
        whole = self.vocab * self.model.d_model * self.c  # of the embedding, as backward left it
        if not self.fsdp:
            return blocks * self.w + root * self.w + whole
        rounded = self.w < self.g  # replicas' sums then stay in fp32 until the end
        reduced = shards * (self.g + self.w * rounded) + blocks * self.g * (rounded and self.layout.replicate > 1)
        copies = 2 if later or self.data == 1 else 1  # what is sent, and what it was copied from
        return blocks * self.w + root * self.g * copies + reduced + whole

    def _fixed(self) -> dict[str, int]:
        shards = self._all_shards()
        return dict.fromkeys(MEMORY_KINDS, 0) | {"weights": shards * self.w, "optimizer": 2 * shards * self.m + 4}

    def _all_shards(self) -> int:
        return self._shards(self.root) + self.model.layers * self._shards(self.block)

    def _mask(self) -> int:
        """Which query sees which key, where attention takes it so: in fp32."""
        if not self.masked:
            return 0
        rows = self.layout.micro_batch
        return rows * (self.tokens // rows) * (self.tokens // rows * self.layout.context) * self.c

    def _keys(self) -> int:
        """Elements of keys and values that attention saves on this rank, but for gathered ones."""
        return 0 if self.layout.context > 1 else 2 * self.tokens * self.attended

    def _gathered(self) -> int:
        """FSDP's whole weights during the loss."""
        if not self.fsdp:
            return 0
        blocks = self.model.layers * self._sizes(self.block)
        return (self._sizes(self.root) + (blocks if self.kept or not self.units else 0)) * self.c

    def _kept_rows(self) -> int:
        """Hidden states that a tensor group has gathered and keys that a context group has, saved for backward."""
        return self._kept_rows_of_block() * self.model.layers if self.layout.recompute == "none" else 0

    def _kept_rows_of_block(self) -> int:
        found = 2 * self.tokens * self.model.d_model if self.layout.tensor > 1 else 0
        if self.layout.context > 1 and self.masked:  # whole rows, for each query head its own
            found += 2 * self.tokens * self.layout.context * self.attended
        elif self.layout.context > 1:
            found += 2 * self.keys * self.kv
        return found * self.c

    def _saved(self) -> int:
        """Of a block, for backward."""
        d, c = self.model.d_model, self.c
        if self.layout.recompute == "block":
            return self.own * d * c
        if self.layout.recompute == "selective":
            return self._products() + (self.tokens + self.own) * d * c
        return self._saved_within()

    def _products(self) -> int:
        """What selective recomputation keeps of a block within it: products, but for attention's last and the block's,
        and what attention returns."""
        widths = 2 * self.q + 2 * self.kv + 2 * self.f
        return self.tokens * (widths * self.c + self.heads * 4)

    def _recomputed(self) -> int:
        """What a block has in addition while it is computed again in backward; its input is kept already."""
        if self.layout.recompute == "none":
            return 0
        again = self._saved_within() - self.own * self.model.d_model * self.c + self._kept_rows_of_block()
        if self.layout.recompute == "block":
            return again
        shared = self.q + self.kv + 2 * self.f + (self.q + self.kv if self.model.qk_norm else 0)
        return again - self.tokens * (shared * self.c + self.heads * 4)

    def _saved_within(self) -> int:
        """Of a block whose forward pass has just run."""
        d, c, qk_norm = self.model.d_model, self.c, self.model.qk_norm
        keys = self._keys()
        states = self.own * d * (4 if self.layout.tensor == 1 else 2)
        heads = self.tokens * self.q * (3 if qk_norm else 2) + keys + (self.tokens * self.kv if qk_norm else 0)
        rest = self.tokens * (self.heads * 4 + (4 * (self.heads + self.kv_heads) if qk_norm else 0)) + 2 * self.own * 4
        return (states + heads + 3 * self.tokens * self.f) * c + rest
