"""What a run records and prints when its training starts: the `start` event, its changes, places, size and data."""

from contextlib import suppress

import torch

from minka.parallel.engine import Engine
from minka.plan.atomic import write_json
from minka.plan.batch_padding import describe_padding
from minka.plan.epochs import describe_epochs
from minka.plan.flops import FORMULAS, parameters, training_flops_per_token
from minka.plan.hardware import find_gpu
from minka.plan.hub_family import reader_limits
from minka.plan.layout import counted
from minka.plan.outlook import outlook_lines, planned_of
from minka.plan.pipeline_stages import stages_of
from minka.plan.resume_rules import Changes, describe_changes
from minka.plan.topology import describe, topology_lines
from minka.train.provenance import processor
from minka.train.recorder import Recorder
from minka.train.state import State


def announce(record: Recorder, state: State, engine: Engine, changed: Changes) -> None:
    """Record and print the start of training. `changed` is against the start before."""
    config, mesh, kernels = record.config, engine.mesh, engine.kernels
    gpu_name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else ""
    gpu = find_gpu(gpu_name) if gpu_name else None
    device = gpu_name or processor()
    dtype = str(mesh.compute_dtype).removeprefix("torch.")
    record.event(
        "start",
        state,
        ranks=mesh.ranks,
        layout=mesh.layout.model_dump(),
        device=device,
        compute_dtype=dtype,
        kernels=kernels.ways(),
        threads=torch.get_num_threads(),
        parameters=parameters(config.model),
        flops_per_token=training_flops_per_token(config.model, config.data.seq_len),
        mfu_formula=FORMULAS["causal"],
        mfu_peak_flops=gpu.peak_flops if gpu else None,
        config=config.model_dump(mode="json"),
        changed=changed,
        lineage=record.lineage,
    )
    lines = [*describe_changes(changed), *kernels.fallbacks]
    if mesh.topology and mesh.is_first:
        places = describe(mesh.layout, mesh.topology, stages_of(mesh.layout, config.model))
        with suppress(OSError):  # no run ends because of this file
            write_json(record.folder.topology_file, places)
        # Printed where the layout is more than data parallelism on one host.
        if len({place.host for place in mesh.topology.places}) > 1 or mesh.layout.data_ways < mesh.ranks:
            lines += topology_lines(places)
    limits = reader_limits(config.model) if config.checkpoint.export else ""
    for line in filter(None, [*lines, describe_padding(config, mesh.layout), limits]):
        record.console.say(line)
    steps, tokens = config.end(state.step, state.tokens)
    planned = planned_of(config, mesh.ranks, gpu.name if gpu else "") if mesh.is_first else {}
    if planned:
        for line in outlook_lines(planned):
            record.console.say(line)
        with suppress(OSError):
            if not (file := record.folder.path / "plan.json").exists():  # it was written before the first step
                write_json(file, planned)
    record.console.say(
        f"{config.run.name}: {parameters(config.model):,} parameters, {tokens:,} tokens in {steps:,} steps; "
        f"{counted(mesh.ranks, 'rank')} on {device}, {dtype}"
    )
    training, validation = record.store.split("train"), record.store.split("validation")
    record.console.say(
        f"{record.store.folder}: {training.n_tokens:,} tokens to train on ({tokens / training.n_tokens:.2g} epochs), "
        f"{counted(validation.n_documents, 'document')} for validation"
    )
    for note in filter(None, [*record.store.manifest.notes, describe_epochs(tokens, training.n_tokens)]):
        record.console.say(note)
    if config.kernels.compile:
        record.console.say("compiling the blocks: before the first step, and before each step with a new shape")
