"""The rotary tables of positions (RoPE, Su et al. 2021), with Llama 3.1's scaling of frequencies."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minka.plan.config_sections import ModelSection


@dataclass(frozen=True)
class Rope:
    """Rotary tables [B, T, 1, C] in fp32, or fp64; sin with the signs that `kernels.rope.rotate` takes.

    Not a pytree, for the reasons of Structure.
    """

    cos: Tensor
    sin: Tensor


def rope_table(positions_BT: Tensor, cfg: ModelSection, dtype: torch.dtype = torch.float32) -> Rope:
    """The rotation of every position (Su et al. 2021), channels in Hugging Face's half-split order.

    Frequencies are radians per position for each pair of channels [C/2], in fp32 and in transformers' order of
    operations. With `rope_scaling`, Llama 3.1's rule: waves longer than the original context are slowed by `factor`,
    short waves are kept, those between are blended.
    """
    exponents = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device=positions_BT.device) / cfg.head_dim
    frequencies, scaling = 1.0 / cfg.rope_theta**exponents, cfg.rope_scaling
    if scaling is not None:
        waves = scaling.original_max_positions / (2 * math.pi / frequencies)  # in the original context
        smooth = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        smooth = smooth.clamp(0, 1)
        frequencies = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions_BT.to(exact)[:, :, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return Rope(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))
