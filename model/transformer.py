"""A Llama-like decoder for one device; parallel/ cuts it from outside.

B batch · T tokens · D width · H query heads · K key/value heads · C head width · F feed-forward width · V vocabulary

Published variants are settings of it: Llama and Mistral as they are, Qwen 2 with `qkv_bias`, Qwen 3 with `qk_norm`.
"""

from collections.abc import MutableSequence

import torch
from einops import rearrange
from torch import Tensor, nn

from minka.kernels.choose import Kernels, Way
from minka.kernels.norm_rope import norm_rope
from minka.kernels.rms_norm import add_rms_norm, rms_norm
from minka.kernels.rope import rope
from minka.kernels.swiglu import swiglu
from minka.model.attention import Structure, attention, document_structure, largest_logit
from minka.model.head import Head, HeadSums
from minka.model.rope_table import Rope, rope_table
from minka.plan.config_sections import ModelSection

PLAIN = Kernels()
Probe = MutableSequence[Tensor] | None  # each attention appends its largest logit, scalar fp32


class Transformer(nn.Module):
    """Tokens to logits, or to sums of the loss. A checkpoint or initial_weights.py sets its weights."""

    def __init__(self, cfg: ModelSection, kernels: Kernels = PLAIN) -> None:
        super().__init__()
        self.cfg, self.kernels = cfg, kernels
        self.embedding = Embedding(cfg.vocab, cfg.d_model, dtype=torch.float32)
        self.blocks = nn.ModuleDict({str(layer): Block(cfg, kernels) for layer in range(cfg.layers)})
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps, kernels.rms_norm)
        tied = self.embedding if cfg.tied else None
        self.head = Head(cfg.d_model, cfg.vocab, cfg.z_loss, tied, kernels.cross_entropy)

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | Structure | None,
        positions: Tensor,
        targets: Tensor | None = None,
        *,
        reduce: bool = True,
        probe: Probe = None,
        at: int | None = None,
    ) -> Tensor | HeadSums:
        """Logits [B, T, V] in fp32; with `targets` HeadSums, or with reduce=False the losses [B, T].

        tokens, documents, positions, targets: int64 [B, T]. documents: ids, or a Structure that is on the device
        already; None: every row is one document. probe: for passes without gradients. at: logits of the tokens at this
        place only, [B, 1, V].
        """
        x_BTD = self.embedding(tokens)
        table = rope_table(positions, self.cfg, x_BTD.dtype)
        structure = documents
        if not isinstance(structure, Structure):
            structure = document_structure(structure, varlen=False).to(x_BTD.device, x_BTD.dtype)
        added_BTD = None  # what the next norm adds to the residual stream
        for block in self.blocks.values():
            x_BTD, added_BTD = block(x_BTD, added_BTD, table, structure, probe)
        x_BTD, _ = self.norm(x_BTD, added_BTD)
        if targets is None:
            return self.head.logits(x_BTD, at)
        return self.head(x_BTD, targets, reduce)


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream.

    What the block before has computed is added by this block's first norm, so that one kernel does both.
    """

    def __init__(self, cfg: ModelSection, kernels: Kernels = PLAIN) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps, kernels.rms_norm)
        self.attention = Attention(cfg, kernels)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps, kernels.rms_norm)
        self.mlp = MLP(cfg, kernels)

    def forward(
        self, x_BTD: Tensor, added_BTD: Tensor | None, table: Rope, structure: Structure, probe: Probe = None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, and what the next norm is to add to it."""
        y_BTD, x_BTD = self.attention_norm(x_BTD, added_BTD)
        y_BTD, x_BTD = self.mlp_norm(x_BTD, self.attention(y_BTD, table, structure, probe))
        return x_BTD, self.mlp(y_BTD)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, cfg: ModelSection, kernels: Kernels = PLAIN) -> None:
        super().__init__()
        self.head_dim, self.kernels = cfg.head_dim, kernels
        self.wq = Linear(cfg.d_model, cfg.heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.wk = Linear(cfg.d_model, cfg.kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.wv = Linear(cfg.d_model, cfg.kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.wo = Linear(cfg.heads * cfg.head_dim, cfg.d_model, bias=False)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, kernels.rms_norm) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, kernels.rms_norm) if cfg.qk_norm else None

    def forward(self, x_BTD: Tensor, table: Rope, structure: Structure, probe: Probe = None) -> Tensor:
        split = "b t (h c) -> b t h c"  # h is inferred, so a shard of the heads needs no change
        q_BTHC = rearrange(self.wq(x_BTD), split, c=self.head_dim)
        k_BTKC = rearrange(self.wk(x_BTD), split, c=self.head_dim)
        v_BTKC = rearrange(self.wv(x_BTD), split, c=self.head_dim)
        q_BTHC, k_BTKC = self._rotate(q_BTHC, k_BTKC, table)
        # Views, not copies: the kernels take any strides and are fastest on this order.
        q, k, v = (rearrange(heads, "b t h c -> b h t c") for heads in (q_BTHC, k_BTKC, v_BTKC))
        if probe is not None:
            probe.append(largest_logit(q, k, structure))
        return self.wo(rearrange(attention(q, k, v, structure), "b h t c -> b t (h c)"))

    def _rotate(self, q_BTHC: Tensor, k_BTKC: Tensor, table: Rope) -> tuple[Tensor, Tensor]:
        """Queries and keys by their positions, after their norms where the model has them."""
        if self.q_norm is None or self.k_norm is None:
            return rope(q_BTHC, k_BTKC, table.cos, table.sin, self.kernels.rope)
        if self.kernels.rope == "triton":
            weights, eps = (self.q_norm.here(), self.k_norm.here()), self.q_norm.eps
            return norm_rope(q_BTHC, k_BTKC, *weights, eps, table.cos, table.sin, "triton")
        return rope(self.q_norm(q_BTHC)[0], self.k_norm(k_BTKC)[0], table.cos, table.sin)


class MLP(nn.Module):
    """Feed-forward layer with a SwiGLU gate."""

    def __init__(self, cfg: ModelSection, kernels: Kernels = PLAIN) -> None:
        super().__init__()
        self.how = kernels.swiglu
        self.gate = Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.up = Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.down = Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(swiglu(self.gate(x_BTD), self.up(x_BTD), self.how))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in fp32 within."""

    def __init__(self, width: int, eps: float, how: Way = "torch") -> None:
        super().__init__()
        self.eps, self.how = eps, how
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))

    def here(self) -> Tensor:
        """The weight as a plain tensor."""
        return self.weight

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the norm of x + added, x + added); added=None stands for 0."""
        if added is None:
            return rms_norm(x, self.here(), self.eps, self.how), x
        return add_rms_norm(x, added, self.here(), self.eps, self.how)


class Linear(nn.Linear):
    """nn.Linear in fp32 that leaves its weights to model/initial_weights.py."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias, dtype=torch.float32)

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding that leaves its weights to model/initial_weights.py."""

    def reset_parameters(self) -> None:
        pass
