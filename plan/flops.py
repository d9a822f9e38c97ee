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

# Fields of Shape that ModelSection has, too.
SHARED = ("layers", "d_model", "heads", "kv_heads", "head_dim", "d_ff", "vocab", "tied", "qk_norm")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that its counts depend on. Wider than ModelSection, for published models."""

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
    norms: int = 2  # of width d_model, in each layer
    experts: int = 1  # feed-forward layers of width d_ff in each layer; above 1 with a router
    active_experts: int = 1  # that a token passes through

    @classmethod
    def of(cls, model: ModelSection) -> Self:
        """Return the shape of a model that minka trains."""
        same = {name: getattr(model, name) for name in SHARED}
        return cls(**same, biases="qkv" if model.qkv_bias else "none")

    @property
    def query_width(self) -> int:
        """Columns of the query projection: heads x head width, which may differ from d_model."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the key (or the value) projection."""
        return self.kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer's matrices, without biases and norms."""
        return self._matrices(self.experts)

    @property
    def active_matrices(self) -> int:
        """Those of them that one token is multiplied with."""
        return self._matrices(self.active_experts)

    @property
    def layer_parameters(self) -> int:
        """All weights of one layer."""
        d = self.d_model
        count = self.layer_matrices + self.norms * self._norm + (2 * self.head_dim if self.qk_norm else 0)
        if self.biases != "none":
            count += self.query_width + 2 * self.kv_width
        if self.biases == "all":
            count += d + (self.mlp_matrices - 1) * self.d_ff + d
        return count

    @property
    def parameters(self) -> int:
        """All weights; a tied head counts once."""
        embeddings = self.vocab * self.d_model * (1 if self.tied else 2) + self.learned_positions * self.d_model
        return self.layers * self.layer_parameters + self._norm + embeddings

    @property
    def _norm(self) -> int:
        return self.d_model * (2 if self.biases == "all" else 1)

    def _matrices(self, experts: int) -> int:
        attention = self.d_model * (2 * self.query_width + 2 * self.kv_width)
        router = self.d_model * self.experts if self.experts > 1 else 0
        return attention + router + experts * self.mlp_matrices * self.d_model * self.d_ff


def parameters(model: ModelSection | Shape) -> int:
    """Return the exact number of trainable weights; a tied head counts once."""
    return (model if isinstance(model, Shape) else Shape.of(model)).parameters


def training_flops_per_token(model: ModelSection | Shape, seq_len: float, convention: Convention = "causal") -> float:
    """Return the FLOPs to train on one token: forward and backward, nothing for recomputation.

    `seq_len` is the span that attention sees: the sequence, or sum(l^2) / sum(l) for packed documents of lengths l.
    "causal" counts each matrix once forward and twice backward, the head included, the embedding look-up as nothing,
    and the half of attention that a causal mask leaves; of experts, those a token passes through. "palm" is the older
    convention: all weights, and unmasked attention.
    """
    shape = model if isinstance(model, Shape) else Shape.of(model)
    if convention == "palm":
        return 6 * parameters(shape) + 12 * shape.layers * shape.query_width * seq_len
    attention = 4 * seq_len * shape.query_width / 2  # scores and values, 2she each, halved by the mask
    return 3 * (shape.layers * (2 * shape.active_matrices + attention) + 2 * shape.d_model * shape.vocab)


class Mfu(NamedTuple):
    """Model FLOPs utilisation, with the two values that define it."""

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
    """Return the share of the peak of `ranks` GPUs that `tokens_per_second` (over all ranks) uses."""
    rate = tokens_per_second * training_flops_per_token(model, seq_len, convention)
    return Mfu(rate / (peak_flops * ranks), FORMULAS[convention], peak_flops)
