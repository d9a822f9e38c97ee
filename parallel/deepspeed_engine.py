"""DeepSpeed's ZeRO, stages 1 to 3, with the interface of every engine (Rajbhandari et al. 2020).

DeepSpeed owns backward, reduction and the order of an update. Its inner optimizer is torch's fused AdamW, which gets
clipping and refusal as from torch.amp.GradScaler (`grad_scale`, `found_inf`): a refused step goes through DeepSpeed's
whole step and changes no bit. DeepSpeed averages gradients over ranks, so the loss is multiplied by their number.
Its own checkpoints are pickles: what is saved and restored are views of the fp32 partitions (deepspeed_slices.py).
"""

import logging
import os
import warnings
from collections.abc import Callable
from functools import wraps
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from minka.model.transformer import Transformer
from minka.parallel.apply import initialise
from minka.parallel.choose_kernels import kernels_of
from minka.parallel.compile_block import compile_block
from minka.parallel.deepspeed_slices import gradient_of, slices
from minka.parallel.engine import Engine
from minka.parallel.fsdp_engine import FsdpExecutor
from minka.parallel.inputs import InputCutter
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, piece_of
from minka.parallel.recompute import SelectivePolicy, recompute
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.tensor_name import tensor_name

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
    # Cut parameter by parameter under stage 3, whole on this rank's device otherwise.
    cuts = mesh.layout.zero_stage == 3
    with deepspeed.zero.Init(config_dict_or_path=settings) if cuts else mesh.device:
        model = Transformer(config.model, kernels_of(config, mesh))
    blocks: list[Any] = list(model.blocks.values())
    policy = SelectivePolicy()
    for block in blocks:
        if config.layout.recompute != "none":
            recompute(block, config.layout.recompute, policy)
        if config.kernels.compile:
            compile_block(block, full_graph=config.layout.recompute == "none")
    if cuts:
        _gather_outside(deepspeed, model)
    optimizer = _adamw(model, config, decay)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    built = DeepSpeedEngine(engine, optimizer, InputCutter.of(config, mesh), decay)
    weights = ((tensor_name(key), piece) for key, piece in built.tensors().items() if key.startswith("model."))
    initialise(((name.removeprefix("model."), piece) for name, piece in weights), config, mesh.device)
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


class DeepSpeedExecutor(FsdpExecutor):
    """Runs the micro-batches of a step one after the other under DeepSpeed."""

    def __init__(self, deepspeed: Any, mesh: Mesh) -> None:
        super().__init__([deepspeed.module], mesh)
        self.trained = deepspeed  # it takes every call for the start of a micro-batch of the step

    def backward(self, objective: Tensor) -> None:
        self.trained.backward(objective * self.mesh.ranks, scale_wrt_gas=False)

    def schedule_reduction(self, *, last: bool) -> None:
        """Stage 1 reduces once, in the last micro-batch; stages 2 and 3 in each, to save memory."""
        self.trained.set_gradient_accumulation_boundary(last)


class DeepSpeedEngine(Engine):
    """One model under ZeRO over all ranks."""

    def __init__(self, deepspeed: Any, optimizer: Any, cutter: InputCutter, decay: Decay) -> None:
        super().__init__(DeepSpeedExecutor(deepspeed, cutter.mesh), cutter, optimizer)
        self._deepspeed, self._adamw, self._decay = deepspeed, optimizer, decay
        if self.mesh.layout.zero_stage == 3:  # the inner optimizer gets one at a time
            self._partitions: list[Tensor] = list(deepspeed.optimizer.fp32_partitioned_groups_flat)
        else:
            self._partitions = [group["params"][0] for group in optimizer.param_groups]
        self._slices = slices(deepspeed.optimizer, self._partitions, deepspeed.module, self.mesh)
        # Boxes of the flattened parameters: for norms, not for checkpoints.
        self._pieces = {s.name: Piece(s.of(s.partition), (s.first,), (prod(s.shape),)) for s in self._slices}
        for partition in self._partitions:  # now, so that there are moments to restore into
            flat = partition.detach().zero_()  # DeepSpeed never sets its padding
            optimizer.state[partition] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        self._accepted = torch.zeros((), dtype=torch.bool, device=self.mesh.device)

    def apply(self, learning_rate: float, max_norm: float, accept: Tensor) -> None:
        """DeepSpeed waits for the device in its own step."""
        self._accepted, device = accept, self._partitions[0].device
        # With offloaded moments the kernel runs on the host, and torch would copy these there without waiting for them.
        self._adamw.grad_scale = ((self._norm + 1e-6) / max_norm).clamp(min=1.0).to(device)
        self._adamw.found_inf = (~accept).float().to(device)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._deepspeed.step()

    def gradients(self) -> dict[str, Tensor]:
        return {s.name: gradient_of(self._deepspeed.optimizer, s) for s in self._slices}

    def tensors(self) -> dict[str, Piece]:
        """A rank's range of a matrix is up to three boxes: NAME, NAME#1 and NAME#2."""
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
        return self._adamw.state[self._partitions[0]]["step"]

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
    else:  # its index among the visible GPUs, to DeepSpeed (zero.Init); parallel/local_device.py has chosen it
        os.environ["LOCAL_RANK"] = str(device.index)
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


def _gather_outside(deepspeed: Any, model: Transformer) -> None:
    """Stage 3 gathers weights when their own module is called: not for a tied head, head.logits, fused norms of heads.

    Its own GatheredParameters does not know what is prefetched for the next module; a call of the head does.
    """
    head: Any = model.head
    logits, forward = head.logits, head.forward
    deepspeed.zero.register_external_parameter(head, head.matrix())
    attentions: list[Any] = [block.attention for block in model.blocks.values()]
    for attention in attentions:
        if attention.q_norm is not None and model.kernels.rope == "triton":  # one kernel does norms and rotation
            deepspeed.zero.register_external_parameter(attention, attention.q_norm.weight)
            deepspeed.zero.register_external_parameter(attention, attention.k_norm.weight)

    @wraps(forward)
    def either(*given: Any, only_logits: bool = False, **options: Any) -> Any:
        return (logits if only_logits else forward)(*given, **options)

    @wraps(logits)
    def called(hidden: Tensor, at: int | None = None) -> Tensor:
        return head(hidden, at, only_logits=True)

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
