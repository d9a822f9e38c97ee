"""Parameters and training FLOPs of a decoder, counted exactly.

L layers, d model width, h query heads, k key/value heads, e head width, f feed-forward width, V vocabulary, s tokens.
A FLOP is one addition or one multiplication: a matrix product (m x n)(n x p) is 2mnp.
"""

from dataclasses import dataclass
from typing import Literal

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
    def of(cls, model: "ModelSection | Shape") -> "Shape":
        """Return the shape of a model that minka trains; a shape as it is."""
        if isinstance(model, Shape):
            return model
        return cls(**{name: getattr(model, name) for name in SHARED}, biases="qkv" if model.qkv_bias else "none")

    @property
    def query_width(self) -> int:
        """Columns of the query projection: heads x head width, which may differ from d_model."""
        return self.heads * self.head_dim

    @property
    def norm_parameters(self) -> int:
        """Weights of one norm of width d_model."""
        return self.d_model * (2 if self.biases == "all" else 1)

    def layer_matrices(self, experts: int) -> int:
        """Weights of one layer's matrices, without biases and norms, of `experts` experts."""
        attention = 2 * self.d_model * (self.query_width + self.kv_heads * self.head_dim)
        router = self.d_model * self.experts if self.experts > 1 else 0
        return attention + router + experts * self.mlp_matrices * self.d_model * self.d_ff

    @property
    def layer_parameters(self) -> int:
        """All weights of one layer."""
        norms = self.norms * self.norm_parameters + (2 * self.head_dim if self.qk_norm else 0)
        biases = 0
        if self.biases != "none":
            biases += self.query_width + 2 * self.kv_heads * self.head_dim
        if self.biases == "all":
            biases += 2 * self.d_model + (self.mlp_matrices - 1) * self.d_ff
        return self.layer_matrices(self.experts) + norms + biases


def parameters(model: ModelSection | Shape) -> int:
    """Return the exact number of trainable weights; a tied head counts once."""
    shape = Shape.of(model)
    embeddings = shape.d_model * (shape.vocab * (1 if shape.tied else 2) + shape.learned_positions)
    return shape.layers * shape.layer_parameters + shape.norm_parameters + embeddings


def training_flops_per_token(model: ModelSection | Shape, seq_len: float, convention: Convention = "causal") -> float:
    """Return the FLOPs to train on one token: forward and backward, nothing for recomputation.

    `seq_len` is the span that attention sees: the sequence, or sum(l^2) / sum(l) for packed documents of lengths l.
    "causal" counts each matrix once forward and twice backward, the head included, the embedding look-up as nothing,
    and the half of attention that a causal mask leaves; of experts, those a token passes through. "palm" is the older
    convention: all weights, and unmasked attention.
    """
    shape = Shape.of(model)
    if convention == "palm":
        return 6 * parameters(shape) + 12 * shape.layers * shape.query_width * seq_len
    matrices = 2 * shape.layer_matrices(shape.active_experts)
    attention = 4 * seq_len * shape.query_width / 2  # scores and values, 2she each, halved by the mask
    return 3 * (shape.layers * (matrices + attention) + 2 * shape.d_model * shape.vocab)
