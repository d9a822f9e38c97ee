"""What a rank computes and moves in a step: FLOPs and bytes of a block, of the head, of the update.

Symbols as in flops.py. T tokens of a micro-batch on this rank, t ways of the tensor axis. Elements are of the compute
dtype; bytes are what kernels must at least read and write.
"""

from dataclasses import dataclass
from typing import NamedTuple

from minka.plan.flops import Shape, parameters
from minka.plan.layout import Layout


@dataclass(frozen=True)
class Part:
    """What decides the work of a block on one rank, and of the ends of the model."""

    shape: Shape
    seq_len: int
    tensor: int = 1
    context: int = 1
    micro_batch: int = 1
    recompute: str = "none"
    fused: bool = True  # norms, rotations and activations in single kernels, or compiled
    element_bytes: int = 2
    tensor_overlaps: bool = False  # collectives of tensor groups run next to the products that make or take their rows

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on this rank."""
        return self.micro_batch * self.seq_len // self.context


@dataclass(frozen=True)
class StepJob:
    """A step to be timed: a part of a model, a resolved layout, and how they are run."""

    part: Part
    layout: Layout
    micro_batches: int
    stage_layers: tuple[int, ...]  # layers of each stage of the pipeline
    freed: bool = False  # FSDP gathers blocks again in each forward and backward pass
    gathers: float = 1.0  # of blocks in a step, where they are not freed
    reduce_each: bool = False  # gradients are reduced after every micro-batch, not once
    reduce_bytes: int = 4
    update_bytes: int = 30  # that an optimizer moves for each weight
    units: int = 0  # collectives that gather all blocks of a rank; 0: one a block


class PassWork(NamedTuple):
    """Of one pass."""

    matrix_flops: float = 0.0
    attention_flops: float = 0.0
    moved_bytes: float = 0.0
    layers: float = 0.0  # passes through a block that are launched

    def plus(self, other: "PassWork", times: float = 1.0) -> "PassWork":
        """Return this work and `times` the other."""
        return PassWork(*(mine + times * added for mine, added in zip(self, other, strict=True)))


class Widths(NamedTuple):
    """Channels of a block on a rank of the tensor group; hidden: of its share of the tokens between matrices."""

    hidden: float
    queries: float
    keys: float
    feed_forward: float
    rotated: float  # of queries and keys, where the model has RoPE
    gated: bool

    @classmethod
    def of(cls, part: Part) -> "Widths":
        """The widths of a part of a model."""
        shape, t = part.shape, part.tensor
        q, kv = shape.query_width / t, shape.kv_width / t
        rotated = 0.0 if shape.learned_positions else q + kv
        return cls(shape.d_model / t, q, kv, shape.d_ff / t, rotated, shape.mlp_matrices == 3)


def products(shape: Shape, tensor: int) -> list[tuple[float, float]]:
    """Return (inputs, outputs) of each matrix product of a block on a rank; a tensor group cuts one of the two."""
    d, q, kv, f = shape.d_model, shape.query_width / tensor, shape.kv_width / tensor, shape.d_ff / tensor
    return [(d, q), (d, kv), (d, kv), (q, d)] + [(d, f)] * (shape.mlp_matrices - 1) + [(f, d)]


def block_forward(part: Part) -> PassWork:
    """A block's forward pass over one micro-batch."""
    cut, tokens = products(part.shape, part.tensor), part.tokens
    flops = 2 * tokens * sum(inputs * outputs for inputs, outputs in cut)
    elements = sum(tokens * (inputs + outputs) + inputs * outputs for inputs, outputs in cut)
    d, q, kv, f, rotated, gated = Widths.of(part)
    attention = 2 * (q + kv)
    if part.fused:  # twice: a sum and a norm in one
        within = 8 * d + 2 * rotated + (3 if gated else 2) * f + attention
    else:  # twice: a norm, then a sum
        within = 10 * d + 6 * rotated + (5 if gated else 2) * f + attention
    # Scores and values, of the half that a causal mask leaves.
    return PassWork(flops, 2 * tokens * part.seq_len * q, part.element_bytes * (elements + tokens * within), 1.0)


def block_backward(part: Part) -> PassWork:
    """A block's backward pass, without what it computes again."""
    forward, tokens = block_forward(part), part.tokens
    elements = 2 * sum(tokens * (i + o) + i * o for i, o in products(part.shape, part.tensor))
    d, q, kv, f, rotated, gated = Widths.of(part)
    attention = 4.4 * (q + kv)
    if part.fused:
        within = 8 * d + 2 * rotated + (5 if gated else 3) * f + attention
    else:
        biases = q + 2 * kv + 2 * d + f if part.shape.biases == "all" else 0
        within = 12 * d + 8 * rotated + (8 if gated else 3) * f + attention + biases
    moved = part.element_bytes * (elements + tokens * within)
    # Attention has five products backward and two forward (arXiv:2307.08691, section 3.1).
    return PassWork(2 * forward.matrix_flops, 2.5 * forward.attention_flops, moved, 1.5)


def recomputed(part: Part) -> PassWork:
    """What a block's backward pass computes again."""
    if part.recompute == "none":
        return PassWork()
    if part.recompute == "block":
        return block_forward(part)
    d, q, _, f, rotated, _ = Widths.of(part)
    again = 2 * part.tokens * q * part.shape.d_model if part.tensor > 1 else 0  # attention's last product
    return PassWork(again, 0.0, part.element_bytes * part.tokens * (8 * d + 2 * rotated + 3 * f), 0.5)


def head_work(part: Part) -> PassWork:
    """Head and loss of one micro-batch, forward and backward: logits are made once, in chunks."""
    rows, d, tokens = part.shape.vocab / part.tensor, part.shape.d_model, part.tokens
    elements = 3 * (tokens * (d + rows) + d * rows)
    return PassWork(
        6 * tokens * d * rows, 0.0, part.element_bytes * elements + tokens * rows * (8 if part.fused else 24)
    )


def embedding_work(part: Part) -> PassWork:
    """The look-up and its gradient."""
    return PassWork(0.0, 0.0, 8 * part.tokens * part.shape.d_model / part.tensor, 0.0)


def block_weights(part: Part) -> float:
    """Weights of a block on a rank before FSDP cuts them."""
    matrices = sum(inputs * outputs for inputs, outputs in products(part.shape, part.tensor))
    return matrices + part.shape.layer_vectors


def end_weights(part: Part) -> float:
    """Weights of embedding, final norm and head together, on a rank of the tensor group."""
    blocks = part.shape.layers * (part.shape.layer_matrices(1) + part.shape.layer_vectors)
    return (parameters(part.shape) - blocks) / part.tensor
