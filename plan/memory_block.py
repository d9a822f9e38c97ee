"""Bytes of one block on a rank: its weights, what its forward pass saves for backward, and what backward adds."""

from typing import NamedTuple

from minka.plan.config import RunConfig
from minka.plan.execution_choices import compute_dtype_name, logit_rows, needs_fsdp
from minka.plan.layout import Layout

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


class BlockMemory:
    """Sizes that every block of a run has, and the run's widths, dtypes and tokens. Methods return bytes.

    c, w, m, g: bytes of an element of activations and gathered weights, of stored weights, of moments, and of gradients
    that are added up. q, kv, f, vocab, heads, kv_heads: widths on a rank. device_kind: "cuda" or "cpu", whose products
    and attention differ.
    """

    def __init__(self, config: RunConfig, layout: Layout, device_kind: str = "cuda") -> None:
        m, self.layout, self.model, self.device_kind = config.model, layout, config.model, device_kind
        precision = compute_dtype_name(layout, device_kind)
        self.c = BYTES[precision]
        self.w = BYTES["fp64"] if precision == "fp64" else BYTES[config.optimizer.weights]
        self.m = BYTES["fp64"] if precision == "fp64" else BYTES[config.optimizer.moments]
        self.g = max(4, self.c)
        t, self.data = layout.tensor, layout.shard * layout.context
        self.fsdp = needs_fsdp(layout, casts=2 in (self.c, self.w))
        self.q, self.kv = m.heads * m.head_dim // t, m.kv_heads * m.head_dim // t
        self.f, self.vocab, self.heads, self.kv_heads = m.d_ff // t, m.vocab // t, m.heads // t, m.kv_heads // t
        d = self.d = m.d_model
        matrices = [Matrix(self.q, d), Matrix(self.kv, d), Matrix(self.kv, d), Matrix(d, self.q)]
        matrices += [Matrix(self.f, d), Matrix(self.f, d), Matrix(d, self.f), Matrix(d, 1), Matrix(d, 1)]
        matrices += [Matrix(m.head_dim, 1)] * 2 if m.qk_norm else []
        matrices += [Matrix(self.q, 1), Matrix(self.kv, 1), Matrix(self.kv, 1)] if m.qkv_bias else []
        self.parameters = matrices
        self.size, self.shards = sizes(matrices), self.shards_of(matrices)
        on_gpu = device_kind == "cuda"
        self.masked = self.c >= 4 or not on_gpu  # attention takes a mask, and on a GPU has no groups then
        self.attended = self.q if on_gpu and self.masked and self.kv < self.q else self.kv
        self.tokens = layout.micro_batch * config.data.seq_len // layout.context  # in attention and feed-forward
        self.own = self.tokens // t  # between them
        self.keys = layout.micro_batch * config.data.seq_len  # of attention
        if layout.context > 1:  # both chunks of the first rank: the first one's keys, and all
            self.keys = self.keys * (2 * layout.context + 1) // (2 * layout.context)

    @property
    def whole(self) -> int:
        """Gathered weights on all ranks of a tensor group together."""
        t = self.layout.tensor
        cut = (self.q, self.kv)
        return sum(p.size * (t if p.columns > 1 or p.rows in cut else 1) for p in self.parameters) * self.c

    @property
    def hidden(self) -> int:
        """Hidden states of a micro-batch between attention and feed-forward: this rank's share of the tokens."""
        return self.own * self.d * self.c

    def shards_of(self, parameters: list[Matrix]) -> int:
        """Elements of them that this rank stores."""
        ways = self.data if self.fsdp else 1
        return sum(p.shard(ways) for p in parameters)

    def mask(self) -> int:
        """Which query sees which key, where attention takes it so: in fp32."""
        if not self.masked:
            return 0
        rows = self.layout.micro_batch
        return rows * (self.tokens // rows) * (self.tokens // rows * self.layout.context) * self.c

    def angles(self) -> int:
        """Rotary angles of a micro-batch, which a part of the model makes for all of its blocks."""
        return 2 * self.tokens * self.model.head_dim * 4

    def logits(self) -> int:
        """A chunk of them: in the compute dtype, and if that is narrower in fp32."""
        rows = min(self.tokens, logit_rows(self.vocab, self.device_kind))
        return rows * self.vocab * (4 + self.c if self.c < 4 else self.c)

    def kept_rows(self) -> int:
        """Of what a forward pass gathers, what it saves for backward."""
        return self.gathered_rows() if self.layout.recompute == "none" else 0

    def saved(self) -> int:
        """For backward, from the block's input on."""
        if self.layout.recompute == "block":
            return self.hidden
        if self.layout.recompute == "selective":
            return self._products() + self._attended() + self.hidden
        return self._saved_within()

    def recomputed(self) -> int:
        """What a block has in addition to gathered rows while it is computed again in backward, and to its input."""
        if self.layout.recompute == "none":
            return 0
        again = self._saved_within() - self.hidden
        if self.layout.recompute == "block":
            return again
        shared = 2 * (self.q + self.kv) + 2 * self.f  # kept products are dropped as they are used
        return again - self.tokens * (shared * self.c + self.heads * 4) - self._attended()

    def gathered_rows(self) -> int:
        """Hidden states that a tensor group has gathered and keys that a context group has."""
        found = 2 * self.tokens * self.d if self.layout.tensor > 1 else 0
        if self.layout.context > 1 and self.masked:  # whole rows, for each query head its own
            found += 2 * self.tokens * self.layout.context * self.attended
        elif self.layout.context > 1:
            found += 2 * self.keys * self.kv
        return found * self.c

    def _attended(self) -> int:
        """What selective recomputation keeps of attention's last product: it, or the sum over a tensor group."""
        return self.hidden if self.layout.tensor > 1 else self.tokens * self.d * self.c

    def _products(self) -> int:
        """What selective recomputation keeps of a block within it: products, but for attention's last and the block's,
        and what attention returns."""
        widths = 2 * self.q + 2 * self.kv + 2 * self.f
        return self.tokens * (widths * self.c + self.heads * 4)

    def _saved_within(self) -> int:
        """Of a block whose forward pass has just run."""
        d, c, qk_norm = self.d, self.c, self.model.qk_norm
        keys = 0 if self.layout.context > 1 else 2 * self.tokens * self.attended  # not gathered ones
        states = self.own * d * (4 if self.layout.tensor == 1 else 2)
        heads = self.tokens * self.q * (3 if qk_norm else 2) + keys + (self.tokens * self.kv if qk_norm else 0)
        rest = self.tokens * (self.heads * 4 + (4 * (self.heads + self.kv_heads) if qk_norm else 0)) + 2 * self.own * 4
        return (states + heads + 3 * self.tokens * self.f) * c + rest


def sizes(parameters: list[Matrix]) -> int:
    """Their elements."""
    return sum(p.size for p in parameters)
