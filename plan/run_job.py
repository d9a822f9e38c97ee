"""The step of a run that a plan times: what its configuration and its layout make of it on a cluster."""

from minka.plan.cluster import Cluster
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.execution_choices import compute_dtype_name, frees_gathered_weights, fsdp_units
from minka.plan.flops import Shape
from minka.plan.layout import Layout, micro_batches
from minka.plan.pipeline_passes import gathers_of_stage
from minka.plan.pipeline_stages import stages_of
from minka.plan.step_work import Part, StepJob

BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


def on_cluster(config: RunConfig, cluster: Cluster) -> RunConfig:
    """Return the run with the precision that "auto" is there: fp32 on cores, which predictions of memory must know."""
    if not cluster.cores or config.layout.precision != "auto":
        return config
    return config.model_copy(update={"layout": config.layout.model_copy(update={"precision": "fp32"})})


def job_of(config: RunConfig, layout: Layout, cluster: Cluster) -> StepJob:
    """Return a whole batch's step under a resolved layout. Raises UserError for DeepSpeed and offload."""
    for key, value in (("engine", "deepspeed"), ("offload", "optimizer"), ("offload", "all")):
        if getattr(layout, key) == value:
            what, remedy = f"time under {key}={value!r} is not predicted", "run it, or set the default"
            raise UserError(what, where=f"layout.{key}", why="what it does when is its own", remedy=remedy)
    kind = cluster.device_kind
    precision = compute_dtype_name(layout, kind)
    stored = config.optimizer
    state = 8 if precision == "fp64" else 4
    weights = 2 if stored.weights == "bf16" and state == 4 else state
    moments = 2 if stored.moments == "bf16" and state == 4 else state
    layers = tuple(len(stage) for stage in stages_of(layout, config.model))
    asked = config.kernels.asked()
    part = Part(
        shape=Shape.of(config.model),
        seq_len=config.data.seq_len,
        tensor=layout.tensor,
        context=layout.context,
        micro_batch=layout.micro_batch,
        recompute=layout.recompute,
        fused=config.kernels.compile or (kind == "cuda" and "torch" not in (asked["rms_norm"], asked["swiglu"])),
        element_bytes=BYTES[precision],
    )
    # Of the whole tensor group: what decides about units and about freeing them is the size of the model's weights.
    block = (part.shape.layer_matrices(1) + part.shape.layer_vectors) * part.element_bytes
    held = max(sum(layers[stage] for stage in layout.stages_of_rank(rank)) for rank in range(layout.pipeline))
    units = len(fsdp_units([block] * held))
    count = max(micro_batches(layout, config.data))
    return StepJob(
        part=part,
        layout=layout,
        micro_batches=count,
        gathers=gathers_of_stage(layout, count),
        stage_layers=layers,
        freed=bool(units) and frees_gathered_weights(layout, block * held),
        reduce_each=layout.reduce == "micro_batch",
        reduce_bytes=max(4, part.element_bytes),
        update_bytes=2 * weights + 4 * moments + 4 + (part.element_bytes if part.element_bytes < weights else 0),
        units=units or 1,
    )
