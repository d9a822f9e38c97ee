"""Parameters and training FLOPs of a decoder, counted exactly.

L layers, d model width, h query heads, k key/value heads, e head width, f feed-forward width, V vocabulary, s tokens.
A FLOP is one addition or one multiplication: a matrix product (m x n)(n x p) is 2mnp.
"""

from dataclasses import dataclass
from typing import Literal

from minka.plan.config_sections import ModelSection

Convention = Literal["causal", "palm", "6n", "megatron"]
FORMULAS: dict[Convention, str] = {
    "causal": "3 x forward, causal attention: 3(L(2d(2h+2k)e + 6df + 2she) + 2dV) FLOPs a token",
    "palm": "PaLM (arXiv:2204.02311, app. B): 6N + 12Lhes FLOPs a token, full attention",
    "6n": "6N FLOPs a token, no attention (Kaplan et al., arXiv:2001.08361, with all weights counted)",
    "megatron": "Narayanan et al. (arXiv:2104.04473, sec. 3.3): 3(L(2d(2h+2k)e + 6df + 4she) + 2dV), full attention",
}

# Fields of Shape that ModelSection has, too.
SHARED = ("layers", "d_model", "heads", "kv_heads", "head_dim", "d_ff", "vocab", "tied", "qk_norm")


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): queries, and keys with values, by way of ranks."""

    query_rank: int  # 0: queries are projected directly
    kv_rank: int
    rope_dim: int  # channels of a head that are rotated; the key has them once, for all heads
    nope_dim: int  # channels that are not
    value_dim: int


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
    whole_qk_norm: bool = False  # over all heads together, not over each
    mlp_matrices: Literal[2, 3] = 3  # 3: gated (SwiGLU)
    learned_positions: int = 0  # rows of a position embedding; RoPE has none
    norms: int = 2  # of width d_model, in each layer
    experts: int = 1  # feed-forward networks in each layer; above 1 with a router
    active_experts: int = 1  # that a token passes through
    expert_ff: int = 0  # width of an expert; 0: d_ff
    shared_ff: int = 0  # width of the experts that every token passes through, together
    dense_layers: int = 0  # of a model with experts: layers that have one network of width d_ff instead
    latent: Latent | None = None
    window: int = 0  # tokens that some layers see at most; 0: all see everything before
    windowed_layers: int = 0

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
    def kv_width(self) -> int:
        """Columns of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim

    @property
    def norm_parameters(self) -> int:
        """Weights of one norm of width d_model."""
        return self.d_model * (2 if self.biases == "all" else 1)

    @property
    def attention_matrices(self) -> int:
        """Weights of one layer's attention, without biases and norms."""
        if self.latent is None:
            return 2 * self.d_model * (self.query_width + self.kv_width)
        rank, a = self.latent.query_rank, self.latent
        wide = self.heads * (a.nope_dim + a.rope_dim)
        queries = self.d_model * rank + rank * wide if rank else self.d_model * wide
        keys = self.d_model * (a.kv_rank + a.rope_dim) + a.kv_rank * self.heads * (a.nope_dim + a.value_dim)
        return queries + keys + self.heads * a.value_dim * self.d_model

    @property
    def attention_norms(self) -> int:
        """Weights of one layer's norms within attention."""
        if self.latent is not None:
            return self.latent.query_rank + self.latent.kv_rank
        if self.whole_qk_norm:
            return self.query_width + self.kv_width
        return 2 * self.head_dim if self.qk_norm else 0

    @property
    def attention_width(self) -> int:
        """Channels of scores and of values, over all heads: 2 x query_width but for latent attention."""
        if self.latent is None:
            return 2 * self.query_width
        return self.heads * (self.latent.nope_dim + self.latent.rope_dim + self.latent.value_dim)

    def layer_matrices(self, experts: int) -> int:
        """Weights of the matrices of one layer with experts, or of a dense model's, of `experts` experts."""
        router = self.d_model * self.experts if self.experts > 1 else 0
        width = experts * (self.expert_ff or self.d_ff) + self.shared_ff
        return self.attention_matrices + router + self.mlp_matrices * self.d_model * width

    @property
    def dense_layer_matrices(self) -> int:
        """The same of one of `dense_layers`."""
        return self.attention_matrices + self.mlp_matrices * self.d_model * self.d_ff

    def matrices(self, experts: int) -> int:
        """Weights of all layers' matrices, of `experts` experts in each layer that has any."""
        return (self.layers - self.dense_layers) * self.layer_matrices(experts) + (
            self.dense_layers * self.dense_layer_matrices
        )

    @property
    def layer_vectors(self) -> int:
        """Weights of one layer's norms and biases."""
        norms = self.norms * self.norm_parameters + self.attention_norms
        biases = 0
        if self.biases != "none":
            biases += self.query_width + 2 * self.kv_width
        if self.biases == "all":
            biases += 2 * self.d_model + (self.mlp_matrices - 1) * self.d_ff
        return norms + biases

    @property
    def embedding_parameters(self) -> int:
        """Weights of embedding, positions and head; a tied head counts once."""
        return self.d_model * (self.vocab * (1 if self.tied else 2) + self.learned_positions)


def parameters(model: ModelSection | Shape) -> int:
    """Return the exact number of trainable weights; a tied head counts once."""
    return _parameters(Shape.of(model), Shape.of(model).experts)


def active_parameters(model: ModelSection | Shape) -> int:
    """Return the weights that a token passes through: of experts, those it is sent to. Embeddings count whole."""
    return _parameters(Shape.of(model), Shape.of(model).active_experts)


def _parameters(shape: Shape, experts: int) -> int:
    within = shape.matrices(experts) + shape.layers * shape.layer_vectors
    return within + shape.norm_parameters + shape.embedding_parameters


def training_flops_per_token(model: ModelSection | Shape, seq_len: float, convention: Convention = "causal") -> float:
    """Return the FLOPs to train on one token: forward and backward, nothing for recomputation.

    `seq_len` is the span that attention sees: the sequence, or sum(l^2) / sum(l) for packed documents of lengths l.
    "causal" counts each matrix once forward and twice backward, the head included, the embedding look-up as nothing,
    and the half of attention that a causal mask leaves; of experts, those a token passes through. The others are older:
    "megatron" differs in counting unmasked attention, "palm" also in counting all active weights as matrices, "6n"
    counts no attention.
    """
    shape = Shape.of(model)
    if convention == "6n":
        return 6 * active_parameters(shape)
    if convention == "palm":
        return 6 * active_parameters(shape) + 6 * shape.layers * shape.attention_width * seq_len
    seen = seq_len if convention == "megatron" else seq_len / 2
    seen_in_window = seen
    if convention == "causal" and shape.window and shape.window < seq_len:  # the first tokens see fewer
        seen_in_window = shape.window - shape.window**2 / (2 * seq_len)
    spans = (shape.layers - shape.windowed_layers) * seen + shape.windowed_layers * seen_in_window
    attention = 2 * shape.attention_width * spans
    return 3 * (2 * shape.matrices(shape.active_experts) + attention + 2 * shape.d_model * shape.vocab)
