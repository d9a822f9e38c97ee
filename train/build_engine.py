"""The engine of a rank: the model cut for it, its optimizer, and the engine that its layout asks for."""

from collections.abc import Sequence

from minka.model.transformer import Transformer
from minka.parallel.apply import build_parts, weight_pieces
from minka.parallel.deepspeed_engine import build_deepspeed_engine
from minka.parallel.engine import Engine
from minka.parallel.fsdp_engine import FsdpExecutor
from minka.parallel.inputs import InputCutter
from minka.parallel.mesh import Mesh
from minka.parallel.pipeline_engine import PipelineExecutor
from minka.plan.config import RunConfig
from minka.train.layer_stats import Updates
from minka.train.optimizer import AdamW, decay_of


def build_engine(config: RunConfig, mesh: Mesh) -> tuple[Engine, Updates]:
    """This rank's engine, and the object that knows the size of its updates."""
    if mesh.layout.engine == "deepspeed":
        engine = build_deepspeed_engine(config, mesh, lambda name, dims: decay_of(name, dims, config.optimizer))
        return engine, engine
    return engine_over(build_parts(config, mesh), InputCutter.of(config, mesh), config)


def engine_over(parts: Sequence[Transformer], cutter: InputCutter, config: RunConfig) -> tuple[Engine, AdamW]:
    """The engine and optimizer of model parts that have been built already."""
    mesh = cutter.mesh
    optimizer = AdamW(weight_pieces(parts), config.optimizer, parts[0].kernels.adamw, config.run.seed)
    executor = PipelineExecutor(parts, mesh) if mesh.layout.pipeline > 1 else FsdpExecutor(parts, mesh)
    return Engine(executor, cutter, optimizer), optimizer
