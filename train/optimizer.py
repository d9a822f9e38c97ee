"""AdamW on local shards (Loshchilov & Hutter 2019, algorithm 2), with refusal that waits for no device.

By torch's fused kernel, once for each decay, or by Triton's, once for all. Torch's knows no bf16 weights or moments as
ours are: those are updated by Triton's kernel or by its definition.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from minka.kernels.adamw import Box, Coefficients, adamw_
from minka.kernels.choose import Own
from minka.kernels.many_tensors import Chunks
from minka.parallel.pieces import Pieces
from minka.plan.config_sections import OptimizerSection

EMBEDDINGS = ("embedding.weight", "head.weight")


def decay_of(name: str, dims: int, settings: OptimizerSection) -> float:
    """Weight decay of a parameter with `dims` dimensions."""
    decays = dims > 1 and (settings.decay_embeddings or name not in EMBEDDINGS)
    return settings.weight_decay if decays else 0.0


class AdamW:
    """Moments for this rank's pieces of the parameters; no DTensor arithmetic (slow and leaky in foreach form).

    Tensors of one dimension, norms and biases, are never decayed; embeddings and head only with `decay_embeddings`.
    Moments have the dtype of `settings`, fp64 under fp64 weights. Random bits of what is rounded to bf16 follow from
    `seed`, a parameter's name and place in the whole tensor, and the number of the accepted step.
    """

    def __init__(self, weights: Pieces, settings: OptimizerSection, how: Own = "torch", seed: int = 0) -> None:
        self.settings, self.how = settings, how
        self._weights = {name: piece.local for name, piece in weights.items()}
        self._decay = {name: decay_of(name, len(piece.global_shape), settings) for name, piece in weights.items()}
        half = torch.bfloat16 if settings.moments == "bf16" else None
        dtypes = {half or (torch.float32 if w.dtype == torch.bfloat16 else w.dtype) for w in self._weights.values()}
        (dtype,) = dtypes  # the weights' own are all of one dtype
        self._moment1 = {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in self._weights.items()}
        self._moment2 = {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in self._weights.items()}
        device = next(iter(self._weights.values())).device
        self._count = torch.zeros((), dtype=torch.float32, device=device)  # the kernel reads fp32
        self._accepted = torch.zeros((), dtype=torch.bool, device=device)
        self._own = how == "triton" or "bf16" in (settings.weights, settings.moments)
        if self._own:
            self._chunks = Chunks.of([weight.numel() for weight in self._weights.values()], device)
            self._decays = torch.tensor(list(self._decay.values()), dtype=torch.float32).to(device)
            places = [Box.of(_key(seed, n), p.offset, p.local.shape, p.global_shape) for n, p in weights.items()]
            self._boxes = torch.tensor(places, dtype=torch.int64).t().contiguous().to(device)

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, divisor: Tensor, accept: Tensor) -> None:
        """A refused step returns before any write: for torch's kernel it is `found_inf`."""
        device = self._count.device  # the CPU for offloaded weights: then the host waits here
        self._accepted, divisor = accept.to(device), divisor.to(device)
        self._count += self._accepted  # the bias correction counts accepted steps only
        if self._own:
            self._by_own_kernel(gradients, learning_rate, divisor)
            return
        refuse = (~self._accepted).float()
        for decay in sorted(set(self._decay.values())):
            names = [n for n, d in self._decay.items() if d == decay and self._weights[n].numel()]
            if not names:
                continue
            torch._fused_adamw_(
                [self._weights[n] for n in names],
                [gradients[n] for n in names],
                [self._moment1[n] for n in names],
                [self._moment2[n] for n in names],
                [],
                [self._count] * len(names),
                lr=learning_rate,
                beta1=self.settings.beta1,
                beta2=self.settings.beta2,
                weight_decay=decay,
                eps=self.settings.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=divisor.float(),
                found_inf=refuse,
            )

    def _by_own_kernel(self, gradients: Mapping[str, Tensor], learning_rate: float, divisor: Tensor) -> None:
        tensors = {
            "weights": list(self._weights.values()),
            "moments1": list(self._moment1.values()),
            "moments2": list(self._moment2.values()),
            "gradients": [gradients[name].contiguous() for name in self._weights],
        }
        s = self.settings
        coefficients = Coefficients(learning_rate, s.beta1, s.beta2, s.eps)
        scalars = self._count, divisor.float(), self._accepted
        adamw_(tensors, self._chunks, self._decays, self._boxes, *scalars, coefficients, self.how)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"moment1": self._moment1, "moment2": self._moment2}

    def count(self) -> Tensor:
        return self._count

    def update_squares(self, learning_rate: float) -> dict[str, Tensor]:
        """Squared norm of what the last step took from each local tensor, rebuilt from the moments; 0 if refused.

        One tensor at a time: no second copy of the model is needed. The step decayed the weight before it, which
        differs from the one used here by lr * decay of itself; what rounding to bf16 added is not in it.
        """
        s, found = self.settings, {}
        for name, weight in self._weights.items():
            # bf16 divided by an fp32 scalar would be bf16
            moment1, moment2 = (x.float() if x.dtype == torch.bfloat16 else x for x in self._moments(name))
            m = moment1 / (1 - s.beta1**self._count)
            v = moment2 / (1 - s.beta2**self._count)
            update = m / (v.sqrt() + s.eps) + self._decay[name] * weight
            square = (learning_rate * update).double().square().sum()
            found[name] = torch.where(self._accepted, square, torch.zeros_like(square))
        return found

    def _moments(self, name: str) -> tuple[Tensor, Tensor]:
        return self._moment1[name], self._moment2[name]


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} rounding {name}".encode()).digest()[:8], "little", signed=True)
