"""DeepSpeed's ZeRO, stages 1 to 3, behind the same interface as every engine (Rajbhandari et al. 2020).

DeepSpeed owns backward, reduction and the order of an update; what is decided stays ours. Its inner optimizer is
torch's fused AdamW, told of clipping and refusal as torch.amp.GradScaler would tell it (`grad_scale`, `found_inf`): so
a refused step goes through DeepSpeed's whole step and changes no bit. DeepSpeed averages gradients over ranks, and the
loss is multiplied by their number beforehand. Its own checkpoints are pickles: what is saved and restored are views of
the fp32 partitions (zero_slices.py).
"""

import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from minka.model.initial_weights import fill_
from minka.model.transformer import Transformer
from minka.parallel.apply import recompute
from minka.parallel.deepspeed_slices import gradient_of, partitions, slices
from minka.parallel.engine import MicroBatch, Sums
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, piece_of, squared_norm, tensor_name
from minka.parallel.precision import compute_dtype
from minka.plan.config import RunConfig
from minka.plan.errors import UserError

Decay = Callable[[str, int], float]  # weight decay by parameter name and number of dimensions

# Elements sent at once; DeepSpeed's 5e8 are 2 GB of staging in fp32, allocated anew for each backward pass.
BUCKET = 2**26
# Stage 3 keeps parameters of at most so many elements on every rank between steps: norms and biases.
PERSISTENT = 10**5


def build_zero_engine(config: RunConfig, mesh: Mesh, decay: Decay) -> "ZeroEngine":
    """The model under ZeRO with its initial weights. Collective.

    Raises UserError when DeepSpeed is not installed.
    """
    deepspeed = _import_deepspeed(mesh.device)
    settings = deepspeed_settings(config, mesh)
    with _construction(deepspeed, mesh, settings):
        model = Transformer(config.model, config.kernels)
    for block in model.blocks.values():
        if config.layout.recompute == "block":
            recompute(block)
        if config.kernels.compile:
            block.compile(fullgraph=config.layout.recompute == "none")
    if mesh.layout.zero_stage == 3:
        _gather_for_head(deepspeed, model)
    optimizer = _adamw(model, config, decay)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    zero = ZeroEngine(engine, optimizer, mesh, decay)
    with torch.no_grad():
        for key, piece in zero.tensors().items():
            if key.startswith("model."):
                name = tensor_name(key.removeprefix("model."))
                where = {"offset": piece.offset, "global_shape": piece.global_shape}
                fill_(piece.local, name, config.run.seed, config.model, **where)
    zero.after_restore()
    return zero


def deepspeed_settings(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """DeepSpeed's configuration: all that it is asked for, and nothing that it would decide by itself."""
    layout = mesh.layout
    zero: dict[str, Any] = {
        "stage": layout.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": PERSISTENT,
        "memory_efficient_linear": False,  # it would replace torch.nn.functional.linear for the whole process
    }
    place = {"device": "cpu", "pin_memory": mesh.device.type == "cuda"}
    if layout.offload != "none":
        zero["offload_optimizer"] = place
    if layout.offload == "all":
        zero["offload_param"] = place
    return {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": 1,  # of its own counting; the engine says where a step ends
        "gradient_clipping": 0.0,
        "steps_per_print": 2**62,
        "bf16": {"enabled": compute_dtype(config, mesh) == torch.bfloat16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its CPU Adam is compiled on the spot
        "zero_optimization": zero,
    }


class ZeroEngine:
    """One model under ZeRO over all ranks. See Engine."""

    def __init__(self, deepspeed: Any, optimizer: torch.optim.AdamW, mesh: Mesh, decay: Decay) -> None:
        self.mesh, self.model = mesh, deepspeed.module
        self._deepspeed, self._adamw, self._decay = deepspeed, optimizer, decay
        self._partitions = partitions(deepspeed.optimizer, optimizer)
        self._slices = slices(deepspeed.optimizer, optimizer, self.model.named_parameters, mesh)
        for partition in self._partitions:  # at once, so that there are moments to restore into
            flat = partition.detach().zero_()  # and no padding that was never set
            optimizer.state[partition] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        self._norm = torch.zeros((), device=mesh.device)
        self._accepted = torch.zeros((), dtype=torch.bool, device=mesh.device)

    def forward_backward(self, micro_batches: Sequence[MicroBatch], target_count: int) -> Sums:
        """See Engine. Stage 1 reduces once, in the last micro-batch; stages 2 and 3 in each, which is their point."""
        total = torch.zeros(2, dtype=torch.float32, device=self.mesh.device)
        for index, batch in enumerate(micro_batches):
            self._deepspeed.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            sums = self._deepspeed(batch.tokens, batch.documents, batch.positions, batch.targets)
            share = sums.objective / max(target_count, 1)
            self._deepspeed.backward(share * self.mesh.ranks, scale_wrt_gas=False)
            total += torch.stack([sums.loss.detach(), sums.z_loss.detach()])
        self.mesh.sum_(total)
        return Sums(total[0], total[1])

    def grad_norm(self) -> Tensor:
        """See Engine."""
        mine = squared_norm(list(self.gradient_pieces().values())).to(self.mesh.device)
        self._norm = self.mesh.sum_(mine).sqrt().float()
        return self._norm

    def apply(self, learning_rate: float, max_norm: float, accept: Tensor) -> None:
        """See Engine; uses the norm of the last grad_norm(). DeepSpeed waits for the device within its own step."""
        self._accepted = accept
        adamw: Any = self._adamw
        adamw.grad_scale = ((self._norm + 1e-6) / max_norm).clamp(min=1.0)
        adamw.found_inf = (~accept).float()
        for group in adamw.param_groups:
            group["lr"] = learning_rate
        self._deepspeed.step()

    def gradient_pieces(self) -> dict[str, Piece]:
        """This rank's gradients by parameter name, as boxes of the flattened parameters; valid until apply()."""
        return {s.name: s.flat_piece(gradient_of(self._deepspeed.optimizer, s)) for s in self._slices}

    def weight_pieces(self) -> dict[str, Piece]:
        """This rank's fp32 weights by parameter name, in the same boxes as gradient_pieces()."""
        return {s.name: s.flat_piece(s.of(s.partition)) for s in self._slices}

    def tensors(self) -> dict[str, Piece]:
        """See Engine. A rank's range of a matrix is up to three boxes: NAME, NAME#1 and NAME#2 (pieces.numbered)."""
        found: dict[str, Piece] = {}
        for s in self._slices:
            state = self._adamw.state[s.partition]
            found |= s.pieces("model", s.partition)
            found |= s.pieces("moment1", state["exp_avg"]) | s.pieces("moment2", state["exp_avg_sq"])
        found["optimizer.count"] = piece_of(self.count())
        return found

    @torch.no_grad()
    def after_restore(self) -> None:
        """See Engine: into the weights that the model computes with, and the counts of the other partitions."""
        count, zero = self.count(), self._deepspeed.optimizer
        for state in self._adamw.state.values():
            state["step"].copy_(count)
        if self.mesh.layout.zero_stage < 3:
            zero.update_lp_params()
            return
        for s in self._slices:
            s.parameter.ds_tensor.narrow(0, 0, s.last - s.first).copy_(s.of(s.partition))
        kept = list(zero.persistent_parameters)  # whole on every rank, and not yet of these values
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def count(self) -> Tensor:
        """Accepted steps, an fp32 scalar where the first partition is."""
        step: Tensor = self._adamw.state[self._partitions[0]]["step"]
        return step

    def token_losses(self, micro_batch: MicroBatch) -> Tensor:
        """See Scorer."""
        b = micro_batch
        return self._forward(b.tokens, b.documents, b.positions, b.targets, reduce=False)

    def next_logits(self, tokens: Tensor, place: int) -> Tensor:
        """See Scorer; every rank computes them, and the first one's count."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits = self._forward(tokens, None, positions, at=place)[0, 0]
        return self.mesh.sum_(logits if self.mesh.is_first else torch.zeros_like(logits))

    def attention_logits(self, micro_batch: MicroBatch) -> dict[int, Tensor]:
        """See Engine."""
        probe: deque[Tensor] = deque()  # a list would be copied by DeepSpeed's hooks on its way down
        b = micro_batch
        with torch.compiler.set_stance("force_eager"):
            self._forward(b.tokens, b.documents, b.positions, b.targets, reduce=False, probe=probe)
        return dict(enumerate(probe))

    def update_squares(self, learning_rate: float) -> dict[str, Tensor]:
        """As train.optim.AdamW's: squared norm of what the last step took from each slice; 0 if it was refused."""
        group, count, found = self._adamw.param_groups[0], self.count(), {}
        beta1, beta2 = group["betas"]
        for s in self._slices:
            state = self._adamw.state[s.partition]
            m = s.of(state["exp_avg"]) / (1 - beta1**count)
            v = s.of(state["exp_avg_sq"]) / (1 - beta2**count)
            update = m / (v.sqrt() + group["eps"]) + self._decay(s.name, len(s.shape)) * s.of(s.partition)
            square = (learning_rate * update).double().square().sum().to(self.mesh.device)
            found[s.name] = torch.where(self._accepted, square, torch.zeros_like(square))
        return found

    def _forward(self, *tensors: Tensor | None, **options: object) -> Tensor:
        """Around DeepSpeed's own forward, which takes every call for the beginning of another micro-batch."""
        with torch.no_grad():
            result: Tensor = self.model(*tensors, **options)
        return result


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told what it would otherwise find out by trying: the accelerator, and which of the node is ours."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            "DeepSpeed is not installed",
            where="layout.engine",
            why=str(error),
            remedy="pip install 'minka[deepspeed]', or set layout.engine=\"fsdp\"",
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # By names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # Nothing is compiled on the spot: without this, CPU ranks build a shared-memory all-reduce in ~/.cache.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _construction(deepspeed: Any, mesh: Mesh, settings: dict[str, Any]) -> AbstractContextManager[Any]:
    """Where the model is made: cut parameter by parameter under stage 3, whole on this rank's device otherwise."""
    if mesh.layout.zero_stage < 3:
        return mesh.device
    context: AbstractContextManager[Any] = deepspeed.zero.Init(config_dict_or_path=settings)
    return context


def _gather_for_head(deepspeed: Any, model: Transformer) -> None:
    """Stage 3 gathers weights when their own module is called: not for a tied head, nor for head.logits.

    Its own GatheredParameters does not know what is being fetched ahead of the next module: calls of the head do.
    """
    head: Any = model.head
    logits, forward = head.logits, head.forward
    deepspeed.zero.register_external_parameter(head, head.matrix())

    @wraps(forward)
    def either(*given: Any, only_logits: bool = False, **options: Any) -> Any:
        return (logits if only_logits else forward)(*given, **options)

    @wraps(logits)
    def called(hidden: Tensor, at: int | None = None) -> Tensor:
        found: Tensor = head(hidden, at, only_logits=True)
        return found

    head.forward, head.logits = either, called


def _adamw(model: nn.Module, config: RunConfig, decay: Decay) -> torch.optim.AdamW:
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        dims = len(getattr(parameter, "ds_shape", parameter.shape))
        groups.setdefault(decay(name, dims), []).append(parameter)
    s = config.optimizer
    return torch.optim.AdamW(
        [{"params": parameters, "weight_decay": value} for value, parameters in sorted(groups.items())],
        lr=s.learning_rate,
        betas=(s.beta1, s.beta2),
        eps=s.eps,
        fused=True,
    )
