"""Under two torchrun agents the mesh follows hosts and GPUs, however the launcher numbers the ranks."""

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import start, written
from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.restore import whole_tensors
from minka.plan.config import RunConfig
from minka.plan.run_folder import RunFolder
from tiny import tiny

HOSTS = ("node2", "node10")


def agents(config: RunConfig, first: str) -> None:
    """Run an agent with two ranks on each of HOSTS; torchrun gives ranks 0 and 1 to `first`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for host in HOSTS:
        number = 0 if host == first else 1
        command = ["--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(number)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        command += ["-m", "minka", "train", str(written(config))]
        running.append(start("torch.distributed.run", *command, MINKA_HOST=host))
    for process in running:
        said = process.communicate()
        assert process.returncode == 0, said


@pytest.mark.slow
def test_the_order_of_ranks_is_that_of_the_hosts(tmp_path: Path) -> None:
    found: dict[str, tuple[dict[Any, Any], dict[str, Any]]] = {}
    for first in HOSTS:
        config = tiny(
            tmp_path,
            run={"name": f"{first}-first", "max_steps": 3},
            model={"layers": 4},
            data={"batch_tokens": 8 * 32, "batch_warmup": []},
            schedule={"kind": "constant", "warmup": 1},
            layout={"pipeline": 2, "tensor": 2, "shard": 1},
        )
        agents(config, first)
        folder = RunFolder.of(config)
        topology = json.loads(folder.topology_file.read_text())
        seats = {(place["host"], place["gpu"]): place["coordinate"] for place in topology["places"]}
        assert [place["rank"] for place in topology["places"]] == ([0, 1, 2, 3] if first == "node2" else [2, 3, 0, 1])
        whole = {n: t.double().numpy() for n, t in whole_tensors(checkpoints(folder.checkpoints)[-1], "model.")}
        found[first] = seats, whole
    (seats, tensors), (others, same) = found.values()
    assert seats == others
    assert [seats[host, 0]["pipeline"] for host in HOSTS] == [0, 1]  # node2 before node10; tensor groups on one host
    assert tensors.keys() == same.keys()
    assert all(np.array_equal(tensors[name], same[name]) for name in tensors)
