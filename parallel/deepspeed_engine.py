"""DeepSpeed's ZeRO, stages 1 to 3, with the interface of every engine (Rajbhandari et al. 2020).

DeepSpeed owns backward, reduction and the order of an update. Its inner optimizer is torch's fused AdamW, which gets
clipping and refusal as from torch.amp.GradScaler (`grad_scale`, `found_inf`): a refused step goes through DeepSpeed's
whole step and changes no bit. DeepSpeed averages gradients over ranks, so the loss is multiplied by their number.
Its own checkpoints are pickles: what is saved and restored are views of the fp32 partitions (deepspeed_slices.py).
"""

import logging
import os
import warnings
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
from minka.parallel.engine import Sums, TorchScorer, sum_over_ranks
from minka.parallel.inputs import InputCutter, ModelInputs
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, piece_of, squared_norm, tensor_name
from minka.plan.config import RunConfig
from minka.plan.errors import UserError

Decay = Callable[[str, int], float]  # weight decay by parameter name and number of dimensions

# Elements sent at once; DeepSpeed's 5e8 need 2 GB of staging in fp32, allocated again for each backward pass.
BUCKET = 2**26
# Stage 3 keeps parameters of at most so many elements on every rank between steps: norms and biases.
PERSISTENT = 10**5


def build_deepspeed_engine(config: RunConfig, mesh: Mesh, decay: Decay) -> "DeepSpeedEngine":
    """The model under ZeRO with its initial weights. Collective.

    Raises UserError when DeepSpeed is not installed.
    """
    deepspeed = _import_deepspeed(mesh.device)
    settings = deepspeed_settings(config, mesh)
    with _construction(deepspeed, mesh, settings):
        model = Transformer(config.model)
    for block in model.blocks.values():
        if config.layout.recompute == "block":
            recompute(block)
        if config.kernels.compile:
            block.compile(fullgraph=config.layout.recompute == "none")
    if mesh.layout.zero_stage == 3:
        _gather_for_head(deepspeed, model)
    optimizer = _adamw(model, config, decay)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    built = DeepSpeedEngine(engine, optimizer, InputCutter.of(config, mesh), decay)
    with torch.no_grad():
        for key, piece in built.tensors().items():
            if key.startswith("model."):
                name = tensor_name(key.removeprefix("model."))
                where = {"offset": piece.offset, "global_shape": piece.global_shape}
                fill_(piece.local, name, config.run.seed, config.model, **where)
    built.after_restore()
    return built


def deepspeed_settings(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """DeepSpeed's configuration; nothing is left to its defaults that changes the run."""
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
        "gradient_accumulation_steps": 1,  # the executor says where a step ends
        "gradient_clipping": 0.0,
        "steps_per_print": 2**62,
        "bf16": {"enabled": mesh.compute_dtype == torch.bfloat16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its CPU Adam is compiled at run time
        "zero_optimization": zero,
    }


class DeepSpeedExecutor:
    """Runs the micro-batches of a step one after the other under DeepSpeed."""

    def __init__(self, deepspeed: Any, mesh: Mesh) -> None:
        self.deepspeed, self.mesh = deepspeed, mesh
        self.parts: list[Transformer] = [deepspeed.module]

    def forward(self, inputs: ModelInputs, **options: object) -> Tensor:
        """Around DeepSpeed's own forward, which takes every call for the start of a micro-batch of the step."""
        b = inputs.to(self.mesh.device, self.mesh.compute_dtype)
        result: Tensor = self.parts[0](b.tokens, b.structure, b.positions, b.targets, **options)
        return result

    def forward_backward(self, micro_batches: Sequence[ModelInputs], divisor: int) -> list[Tensor]:
        """Stage 1 reduces once, in the last micro-batch; stages 2 and 3 in each, to save memory."""
        found = []
        for index, inputs in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            b = inputs.to(self.mesh.device, self.mesh.compute_dtype)
            sums = self.deepspeed(b.tokens, b.structure, b.positions, b.targets)
            self.deepspeed.backward(sums.objective / divisor * self.mesh.ranks, scale_wrt_gas=False)
            found.append(torch.stack([sums.loss.detach(), sums.z_loss.detach()]))
        return found


class DeepSpeedEngine(TorchScorer):
    """One model under ZeRO over all ranks."""

    def __init__(self, deepspeed: Any, optimizer: torch.optim.AdamW, cutter: InputCutter, decay: Decay) -> None:
        super().__init__(DeepSpeedExecutor(deepspeed, cutter.mesh), cutter)
        self._deepspeed, self._adamw, self._decay = deepspeed, optimizer, decay
        self._partitions = partitions(deepspeed.optimizer, optimizer)
        self._slices = slices(deepspeed.optimizer, optimizer, deepspeed.module.named_parameters, self.mesh)
        for partition in self._partitions:  # now, so that there are moments to restore into
            flat = partition.detach().zero_()  # DeepSpeed never sets its padding
            optimizer.state[partition] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        self._norm = torch.zeros((), device=self.mesh.device)
        self._accepted = torch.zeros((), dtype=torch.bool, device=self.mesh.device)

    def forward_backward(self, micro_batches: Sequence[ModelInputs], target_count: int) -> Sums:
        return sum_over_ranks(self.executor.forward_backward(micro_batches, max(target_count, 1)), self.mesh)

    def grad_norm(self) -> Tensor:
        mine = squared_norm(list(self.gradient_pieces().values())).to(self.mesh.device)
        self._norm = self.mesh.sum_(mine).sqrt().float()
        return self._norm

    def apply(self, learning_rate: float, max_norm: float, accept: Tensor) -> None:
        """DeepSpeed waits for the device in its own step."""
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
        """A rank's range of a matrix is up to three boxes: NAME, NAME#1 and NAME#2 (pieces.numbered)."""
        found: dict[str, Piece] = {}
        for s in self._slices:
            state = self._adamw.state[s.partition]
            found |= s.pieces("model", s.partition)
            found |= s.pieces("moment1", state["exp_avg"]) | s.pieces("moment2", state["exp_avg_sq"])
        found["optimizer.count"] = piece_of(self.count())
        return found

    @torch.no_grad()
    def after_restore(self) -> None:
        """Copy the fp32 weights into those that the model computes with, and the count to the other partitions."""
        count, zero = self.count(), self._deepspeed.optimizer
        for state in self._adamw.state.values():
            state["step"].copy_(count)
        if self.mesh.layout.zero_stage < 3:
            zero.update_lp_params()
            return
        for s in self._slices:
            s.parameter.ds_tensor.narrow(0, 0, s.last - s.first).copy_(s.of(s.partition))
        kept = list(zero.persistent_parameters)  # whole on every rank, and still of the old values
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def count(self) -> Tensor:
        """Accepted steps, an fp32 scalar where the first partition is."""
        step: Tensor = self._adamw.state[self._partitions[0]]["step"]
        return step

    def update_squares(self, learning_rate: float) -> dict[str, Tensor]:
        """Squared norm of the last step's update of each slice, as train.optimizer.AdamW's; 0 if it was refused."""
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


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, with the environment variables that it would otherwise guess: the accelerator and the local rank."""
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
    # It calls torch by names that 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # Compile nothing at run time: without this, CPU ranks build a shared-memory all-reduce in ~/.cache.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _construction(deepspeed: Any, mesh: Mesh, settings: dict[str, Any]) -> AbstractContextManager[Any]:
    """Where the model is built: cut parameter by parameter under stage 3, whole on this rank's device otherwise."""
    if mesh.layout.zero_stage < 3:
        return mesh.device
    context: AbstractContextManager[Any] = deepspeed.zero.Init(config_dict_or_path=settings)
    return context


def _gather_for_head(deepspeed: Any, model: Transformer) -> None:
    """Stage 3 gathers weights when their own module is called: not for a tied head, nor for head.logits.

    Its own GatheredParameters does not know what is prefetched for the next module; a call of the head does.
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
