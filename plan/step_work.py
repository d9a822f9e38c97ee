"""What a rank computes and moves in a step: FLOPs and bytes of a block, of the head, of the update.

Symbols as in flops.py. T tokens of a micro-batch on this rank, t ways of the tensor axis. Elements are of the compute
dtype; bytes are what kernels must at least read and write.
"""

from dataclasses import dataclass
from typing import NamedTuple

from minka.plan.flops import Shape, parameters
from minka.plan.layout import Layout


@dataclass(frozen=True)
class Job:
    """A step to be timed: a model, a resolved layout, and how its parts are run."""

    shape: Shape
    layout: Layout
    seq_len: int
    micro_batches: int
    stage_layers: tuple[int, ...]  # layers of each stage of the pipeline
    fused: bool = True  # norms, rotations and activations in single kernels, or compiled
    freed: bool = False  # FSDP gathers blocks again in each forward and backward pass
    reduce_each: bool = False  # gradients are reduced after every micro-batch, not once
    element_bytes: int = 2
    reduce_bytes: int = 4
    update_bytes: int = 30  # that an optimizer moves for each weight
    tensor_overlaps: bool = False  # collectives of tensor groups run next to the products that make or take their rows
    units: int = 0  # collectives that gather all blocks; 0: one a block

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on this rank."""
        return self.layout.micro_batch * self.seq_len // self.layout.context


class Work(NamedTuple):
    """Of one pass."""

    matrix_flops: float = 0.0
    attention_flops: float = 0.0
    moved_bytes: float = 0.0
    layers: float = 0.0  # passes through a block that are launched

    def plus(self, other: "Work", times: float = 1.0) -> "Work":
        """Return this work and `times` the other."""
        return Work(*(mine + times * added for mine, added in zip(self, other, strict=True)))


def products(shape: Shape, tensor: int) -> list[tuple[float, float]]:
    """Return (inputs, outputs) of each matrix product of a block on a rank; a tensor group cuts one of the two."""
    d, q, kv, f = shape.d_model, shape.query_width / tensor, shape.kv_width / tensor, shape.d_ff / tensor
    return [(d, q), (d, kv), (d, kv), (q, d)] + [(d, f)] * (shape.mlp_matrices - 1) + [(f, d)]


def block_forward(job: Job) -> Work:
    """A block's forward pass over one micro-batch."""
    shape, t, T, w = job.shape, job.layout.tensor, job.tokens, job.element_bytes  # noqa: N806
    cut = products(shape, t)
    flops = 2 * T * sum(inputs * outputs for inputs, outputs in cut)
    moved = w * sum(T * (inputs + outputs) + inputs * outputs for inputs, outputs in cut)
    q, kv, f, d = shape.query_width / t, shape.kv_width / t, shape.d_ff / t, shape.d_model / t
    gated = shape.mlp_matrices == 3
    within = 8 * d + 2 * (q + kv) * (not shape.learned_positions) + (3 if gated else 2) * f + 2 * (q + kv)
    if not job.fused:
        within = 10 * d + 6 * (q + kv) * (not shape.learned_positions) + (5 if gated else 2) * f + 2 * (q + kv)
    attention = 2 * T * job.seq_len * q  # scores and values, the half that a causal mask leaves
    return Work(flops, attention, moved + w * T * within, 1.0)


def block_backward(job: Job) -> Work:
    """A block's backward pass, without what it computes again."""
    forward = block_forward(job)
    shape, t, T, w = job.shape, job.layout.tensor, job.tokens, job.element_bytes  # noqa: N806
    q, kv, f, d = shape.query_width / t, shape.kv_width / t, shape.d_ff / t, shape.d_model / t
    moved = 2 * w * sum(T * (i + o) + i * o for i, o in products(shape, t))
    gated = shape.mlp_matrices == 3
    within = 8 * d + 2 * (q + kv) * (not shape.learned_positions) + (5 if gated else 3) * f + 4.4 * (q + kv)
    if not job.fused:
        biases = q + 2 * kv + 2 * d + f if shape.biases == "all" else 0
        within = 12 * d + 8 * (q + kv) * (not shape.learned_positions) + (8 if gated else 3) * f + 4.4 * (q + kv)
        within += biases
    return Work(2 * forward.matrix_flops, 2.5 * forward.attention_flops, moved + w * T * within, 1.5)


def recomputed(job: Job) -> Work:
    """What a block's backward pass computes again."""
    forward = block_forward(job)
    if job.layout.recompute == "none":
        return Work()
    if job.layout.recompute == "block":
        return forward
    shape, t, T, w = job.shape, job.layout.tensor, job.tokens, job.element_bytes  # noqa: N806
    q, kv, f, d = shape.query_width / t, shape.kv_width / t, shape.d_ff / t, shape.d_model / t
    return Work(0.0, 0.0, w * T * (8 * d + 2 * (q + kv) + 3 * f), 0.5)


def head_work(job: Job) -> Work:
    """Head and loss of one micro-batch, forward and backward: logits are made once, in chunks."""
    rows = job.shape.vocab / job.layout.tensor
    d, T, w = job.shape.d_model, job.tokens, job.element_bytes  # noqa: N806
    moved = 3 * w * (T * (d + rows) + d * rows) + T * rows * (8 if job.fused else 24)
    return Work(6 * T * d * rows, 0.0, moved, 0.0)


def embedding_work(job: Job) -> Work:
    """The look-up and its gradient."""
    return Work(0.0, 0.0, 8 * job.tokens * job.shape.d_model / job.layout.tensor, 0.0)


def block_weights(job: Job) -> float:
    """Weights of a block on a rank before FSDP cuts them."""
    matrices = sum(inputs * outputs for inputs, outputs in products(job.shape, job.layout.tensor))
    return matrices + job.shape.layer_vectors


def end_weights(job: Job) -> float:
    """Weights of embedding, final norm and head together, on a rank of the tensor group."""
    blocks = job.shape.layers * (job.shape.layer_matrices(1) + job.shape.layer_vectors)
    return (parameters(job.shape) - blocks) / job.layout.tensor
