"""What a run records and prints when its training starts: the `start` event, its changes, places, size and data."""

from contextlib import suppress

import torch

from minka.parallel.mesh import Mesh
from minka.plan.atomic import write_json
from minka.plan.batch_padding import describe_padding
from minka.plan.flops import FORMULAS, parameters, training_flops_per_token
from minka.plan.hardware import find
from minka.plan.pipeline_stages import stages_of
from minka.plan.resume_rules import Changes, describe_changes
from minka.plan.topology import describe, describe_lines
from minka.train.provenance import processor
from minka.train.recorder import Recorder
from minka.train.state import State


def announce(record: Recorder, state: State, mesh: Mesh, changed: Changes) -> None:
    """Record and print the start of training. `changed` is against the start before."""
    config = record.config
    gpu_name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else ""
    gpu = find(gpu_name) if gpu_name else None
    device = gpu_name or processor()
    dtype = str(mesh.compute_dtype).removeprefix("torch.")
    record.event(
        "start",
        state,
        ranks=mesh.ranks,
        layout=mesh.layout.model_dump(),
        device=device,
        compute_dtype=dtype,
        threads=torch.get_num_threads(),
        parameters=parameters(config.model),
        flops_per_token=training_flops_per_token(config.model, config.data.seq_len),
        mfu_formula=FORMULAS["causal"],
        mfu_peak_flops=gpu.peak_flops if gpu else None,
        config=config.model_dump(mode="json"),
        changed=changed,
        lineage=record.lineage,
    )
    padding = describe_padding(config, mesh.layout)
    for line in [*describe_changes(changed), *_places(record, mesh), *([padding] if padding else [])]:
        record.console.say(line)
    record.console.say(
        f"{config.run.name}: {parameters(config.model):,} parameters, {config.total_tokens:,} tokens in "
        f"{config.total_steps:,} steps; {mesh.ranks} {'rank' if mesh.ranks == 1 else 'ranks'} on {device}, {dtype}"
    )
    training, validation = record.store.split("train"), record.store.split("validation")
    epochs = config.total_tokens / training.n_tokens
    record.console.say(
        f"{record.store.folder}: {training.n_tokens:,} tokens to train on ({epochs:.2g} epochs), "
        f"{validation.n_documents:,} documents for validation"
    )


def _places(record: Recorder, mesh: Mesh) -> list[str]:
    """Write topology.json; the lines to print, where the layout is more than data parallelism on one host."""
    if mesh.topology is None or not mesh.is_first:
        return []
    layers = stages_of(mesh.layout, record.config.model)
    description = describe(mesh.layout, mesh.topology, layers)
    with suppress(OSError):  # no run ends because of this file
        write_json(record.folder.topology_file, description)
    hosts = {place.host for place in mesh.topology.places}
    return describe_lines(description) if len(hosts) > 1 or mesh.layout.data_ways < mesh.ranks else []
