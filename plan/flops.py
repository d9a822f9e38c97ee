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

SYMBOLS = {  # the letters of formulas
    "L": "layers",
    "d": "model width",
    "h": "query heads",
    "k": "key/value heads",
    "e": "head width",
    "q": "rank of queries",
    "r": "rank of keys and values",
    "n": "channels of a head that are not rotated",
    "p": "channels of a head that are rotated",
    "v": "channels of a head's values",
    "f": "feed-forward width",
    "E": "experts",
    "A": "experts that a token passes through",
    "g": "width of an expert",
    "S": "width of the shared experts together",
    "D": "layers without experts",
    "V": "vocabulary",
    "w": "tokens that a windowed layer sees",
    "W": "layers with the window",
    "N": "weights that a token passes through",
    "s": "tokens in a sequence",
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
    head_dim: int  # 0 with latent attention, which has widths of its own
    d_ff: int
    vocab: int
    tied: bool = False
    # qkvo: of all matrices of attention that have any; all: of every matrix but the head, and of the norms (GPT-2)
    biases: Literal["none", "qkv", "qkvo", "all"] = "none"
    mlp_biases: bool = False  # of the feed-forward's matrices; `biases` "all" has them too
    norm_biases: bool = False  # the same
    qk_norm: bool = False
    whole_qk_norm: bool = False  # over all heads together, not over each
    mlp_matrices: Literal[2, 3] = 3  # 3: gated (SwiGLU)
    learned_positions: int = 0  # rows of a position embedding; RoPE has none
    norms: int = 2  # of width d_model, in each layer
    experts: int = 1  # feed-forward networks in each layer
    active_experts: int = 1  # that a token passes through
    expert_ff: int = 0  # width of an expert; 0: a dense model, without a router
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
        return self.d_model * (2 if self.biases == "all" or self.norm_biases else 1)

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
        each = self.head_dim * self.norm_parameters // self.d_model
        return 2 * each if self.qk_norm else 0

    @property
    def attention_width(self) -> int:
        """Channels of scores and of values, over all heads: 2 x query_width but for latent attention."""
        if self.latent is None:
            return 2 * self.query_width
        return self.heads * (self.latent.nope_dim + self.latent.rope_dim + self.latent.value_dim)

    def layer_matrices(self, experts: int) -> int:
        """Weights of the matrices of one layer with experts, or of a dense model's, of `experts` experts."""
        router = self.d_model * self.experts if self.expert_ff else 0
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
        biases = self.attention_biases
        if self.biases == "all" or self.mlp_biases:
            biases += self.d_model + (self.mlp_matrices - 1) * self.d_ff
        return self.norms * self.norm_parameters + self.attention_norms + biases

    @property
    def attention_biases(self) -> int:
        """Weights of one layer's biases within attention; of latent attention where it reads or writes d_model."""
        if self.biases == "none":
            return 0
        out = 0 if self.biases == "qkv" else self.d_model
        if self.latent is None:
            return self.query_width + 2 * self.kv_width + out
        return self.latent.query_rank + self.latent.kv_rank + self.latent.rope_dim + out

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


def formula_of(model: ModelSection | Shape, seq_len: float, convention: Convention = "causal") -> str:
    """Return how `training_flops_per_token` comes out for this model, in the letters of `symbols_of`."""
    shape = Shape.of(model)
    channels = "he" if shape.latent is None else "h(n + p + v)"  # attention_width, or half of it
    twice = 2 if shape.latent is None else 1
    if convention in ("6n", "palm"):
        return "6N" if convention == "6n" else f"6N + {6 * twice}L{channels}s"
    cut = convention == "causal" and 0 < shape.window < seq_len and shape.windowed_layers > 0
    factor, scores = twice * (2 if convention == "megatron" else 1), f"s{channels}"
    scores_of_all = f"{factor}{scores}".removeprefix("1")
    in_each, apart, matrices = [_attention(shape)], [], 2 * shape.mlp_matrices
    experts = f"2dE + {matrices}d" + ("(Ag + S)" if shape.shared_ff else "Ag")
    if shape.dense_layers:
        apart += [f"(L - D)({experts})", f"{matrices}Ddf"]
    else:
        in_each.append(experts if shape.expert_ff else f"{matrices}df")
    if not cut:
        in_each.append(scores_of_all)
    elif shape.windowed_layers < shape.layers:
        apart.append(f"{factor}(L - W){scores}".removeprefix("1"))
    if cut:
        apart.append(f"{2 * twice}W{channels}(w - ww/(2s))")
    return "3(" + " + ".join([f"L({' + '.join(in_each)})", *apart, "2dV"]) + ")"


def symbols_of(model: ModelSection | Shape, seq_len: float) -> dict[str, float]:
    """Return the letters of `formula_of` and their values; SYMBOLS says what they are."""
    shape = Shape.of(model)
    a, cut = shape.latent, 0 < shape.window < seq_len and shape.windowed_layers > 0
    widths = {"k": shape.kv_heads, "e": shape.head_dim} if a is None else {}
    if a is not None:
        widths = {"q": a.query_rank, "r": a.kv_rank, "n": a.nope_dim, "p": a.rope_dim, "v": a.value_dim}
    experts = {"E": shape.experts, "A": shape.active_experts, "g": shape.expert_ff, "S": shape.shared_ff}
    return {
        "L": shape.layers,
        "d": shape.d_model,
        "h": shape.heads,
        **{letter: size for letter, size in widths.items() if size},
        **({"f": shape.d_ff} if not shape.expert_ff or shape.dense_layers else {}),
        **{letter: size for letter, size in experts.items() if size and shape.expert_ff},
        **({"D": shape.dense_layers} if shape.dense_layers else {}),
        "V": shape.vocab,
        **({"w": shape.window, "W": shape.windowed_layers} if cut else {}),
        "N": active_parameters(shape),
        "s": seq_len,
    }


def _attention(shape: Shape) -> str:
    """FLOPs of the matrices of one layer's attention."""
    if shape.latent is None:
        return "2d(2h + 2k)e"
    queries = "dq + qh(n + p)" if shape.latent.query_rank else "dh(n + p)"
    return f"2({queries} + d(r + p) + rh(n + v) + hvd)"
