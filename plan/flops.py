"""Parameters and training FLOPs of a decoder, counted exactly, and what MFU means here.

L layers, d model width, h query heads, k key/value heads, e head width, f feed-forward width, V vocabulary, s tokens.
A FLOP is one addition or one multiplication: a matrix product (m x n)(n x p) is 2mnp.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from minka.plan.config_sections import ModelSection

Convention = Literal["causal", "palm"]
FORMULAS: dict[Convention, str] = {
    "causal": "3 x forward, causal attention: 3(L(2d(2h+2k)e + 6df + 2she) + 2dV) FLOPs a token",
    "palm": "PaLM (arXiv:2204.02311, app. B): 6N + 12Lhes FLOPs a token, full attention",
}


@dataclass(frozen=True)
class Shape:
    """What counting needs to know of a decoder; wider than ModelSection, so that published models can be counted."""

    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    vocab: int
    tied: bool = False
    biases: Literal["none", "qkv", "all"] = "none"  # "all": every matrix but the head, and the norms (GPT-2)
    qk_norm: bool = False
    mlp_matrices: Literal[2, 3] = 3  # 3: gated (SwiGLU)
    learned_positions: int = 0  # rows of a position embedding; RoPE has none

    @classmethod
    def of(cls, model: ModelSection) -> Self:
        """The shape of a model minka trains."""
        return cls(
            layers=model.layers,
            d_model=model.d_model,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            d_ff=model.d_ff,
            vocab=model.vocab,
            tied=model.tied,
            biases="qkv" if model.qkv_bias else "none",
            qk_norm=model.qk_norm,
        )

    @property
    def query_width(self) -> int:
        """Columns of the query projection: heads times head width, which need not be d_model."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the key (or the value) projection."""
        return self.kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer's matrices, without biases and norms."""
        attention = self.d_model * (2 * self.query_width + 2 * self.kv_width)
        return attention + self.mlp_matrices * self.d_model * self.d_ff


def parameters(model: ModelSection | Shape) -> int:
    """Exact number of trainable weights; a tied head counts once."""
    shape = model if isinstance(model, Shape) else Shape.of(model)
    d, norm = shape.d_model, shape.d_model * (2 if shape.biases == "all" else 1)
    layer = shape.layer_matrices + 2 * norm
    if shape.biases != "none":
        layer += shape.query_width + 2 * shape.kv_width
    if shape.biases == "all":
        layer += d + (shape.mlp_matrices - 1) * shape.d_ff + d
    if shape.qk_norm:
        layer += 2 * shape.head_dim
    embeddings = shape.vocab * d * (1 if shape.tied else 2) + shape.learned_positions * d
    return shape.layers * layer + norm + embeddings


def training_flops_per_token(model: ModelSection | Shape, seq_len: float, convention: Convention = "causal") -> float:
    """FLOPs to train on one token: forward and backward, nothing for recomputation.

    `seq_len` is the span attention sees: the sequence, or sum(l^2) / sum(l) for packed documents of lengths l.
    "causal" counts each matrix once forward and twice backward, the head too, the embedding look-up as nothing, and the
    half of attention that a causal mask leaves. "palm" is the older convention: all weights, and attention unmasked.
    """
    shape = model if isinstance(model, Shape) else Shape.of(model)
    if convention == "palm":
        return 6 * parameters(shape) + 12 * shape.layers * shape.query_width * seq_len
    attention = 4 * seq_len * shape.query_width / 2  # scores and values, 2she each, halved by the mask
    return 3 * (shape.layers * (2 * shape.layer_matrices + attention) + 2 * shape.d_model * shape.vocab)


class Mfu(NamedTuple):
    """Model FLOPs utilisation, which is no number without these two."""

    value: float  # of 1
    formula: str
    peak_flops: float  # of one GPU, FLOP/s


def mfu(
    tokens_per_second: float,
    model: ModelSection | Shape,
    seq_len: float,
    peak_flops: float,
    ranks: int,
    convention: Convention = "causal",
) -> Mfu:
    """Share of the peak of `ranks` GPUs that training at `tokens_per_second` (over all ranks) makes use of."""
    rate = tokens_per_second * training_flops_per_token(model, seq_len, convention)
    return Mfu(rate / (peak_flops * ranks), FORMULAS[convention], peak_flops)
