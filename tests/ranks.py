"""Run a function on n ranks: forked from one process that has torch imported, with a file store and a time limit."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# A fork server starts no threads, so forking from it is safe whatever the test process itself has done.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch.distributed.fsdp", "minka.train.worker"])


def on_ranks(body: Callable[..., Any], ranks: int, *args: Any, seconds: float = 800.0) -> list[Any]:
    """What `body(*args)` returns on each rank, in order: numbers, arrays, no tensors. `body` is a module's function.

    The environment of each rank is that of a launched one, so body may call start_mesh. gloo here, nccl where there are
    GPUs. Raises AssertionError with every failed rank's traceback, or when a rank is not done within `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = FORKS.Pipe(duplex=False)
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MINKA_STORE": str(Path(folder) / "rendezvous"),
                "OMP_NUM_THREADS": "1",
            }
            process = FORKS.Process(target=_run, args=(theirs, place, os.getcwd(), body, args), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, processes, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], processes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(pipes):
        for rank, pipe in enumerate(pipes):
            if rank in results or rank in failures or not pipe.poll(0.01):
                continue
            try:
                good, value = pipe.recv()
            except EOFError:
                processes[rank].join(60.0)  # its pipe closes a moment before its exit code is known
                good, value = False, f"ended with exit code {processes[rank].exitcode} and without an error"
            (results if good else failures)[rank] = value
        if failures:
            deadline = min(deadline, time.monotonic() + 20.0)  # the others wait for the one that failed
        if time.monotonic() > deadline:
            break
    hung = sorted(set(range(len(pipes))) - set(results) - set(failures))
    problems = [f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())]
    problems += [f"rank {rank} was not done in time" for rank in hung]
    assert not problems, "\n".join(problems)
    return [results[rank] for rank in range(len(pipes))]


def _run(pipe: Connection, place: dict[str, str], folder: str, body: Callable[..., Any], args: Any) -> None:
    import torch

    os.environ.update(place)
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        pipe.send((True, body(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
