"""What a save costs the training: stall, hashes, memory. Claims of `make bench` (benchmarks/training.py).

The peer is torch's distributed checkpoint (DCP), which saves the same tensors in the same minute.
"""

import hashlib
import multiprocessing
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save

from minka.benchmarks.claims import Claim, check_claims, median_ratio
from minka.checkpoint.async_saver import AsyncSaver
from minka.checkpoint.write import SaveRequest
from minka.parallel.mesh import Mesh, start_mesh
from minka.parallel.pieces import Piece, piece_of
from minka.plan.layout import Layout

PAIRS = 7
STATE_BYTES = 256 * 2**20
FORWARD_BACKWARD_SECONDS = 1.0  # of a model with such a state (20 M parameters, 12 bytes each) on two cores, at least


def made_up_state(size: int = STATE_BYTES) -> dict[str, Tensor]:
    """Return sixteen equal tensors."""
    return {f"model.{i}": torch.randn(size // 64) for i in range(16)}


class Saves:
    """Saves of one state by us and by DCP. Each returns the seconds for which the training waits."""

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        self.folder, self.state = folder, made_up_state()
        self.pieces = {name: piece_of(tensor) for name, tensor in self.state.items()}
        self._sync = AsyncSaver(folder / "sync", mesh, 1, asynchronous=False)
        self._async = AsyncSaver(folder / "async", mesh, 1)
        self._step = 0

    def synchronous(self) -> float:
        """Save until it is committed."""
        return _saved(self._sync, self._next(), self.pieces, 0.0)

    def asynchronous(self, between: float) -> float:
        """Save until the tensors may change, less `between` seconds of forward and backward."""
        return _saved(self._async, self._next(), self.pieces, between)

    def dcp_asynchronous(self) -> float:
        """Save until DCP's async_save returns; the tensors may change then."""
        began = time.perf_counter()
        writing = async_save(self.state, storage_writer=FileSystemWriter(self.folder / "dcp"))
        stall = time.perf_counter() - began
        writing.result()  # type: ignore[union-attr]
        shutil.rmtree(self.folder / "dcp")
        return stall

    def _next(self) -> SaveRequest:
        self._step += 1
        return SaveRequest(self._step, {})


def _saved(saver: AsyncSaver, contents: SaveRequest, pieces: dict[str, Piece], between: float) -> float:
    saver.save(contents, pieces)
    if saver.asynchronous:
        compute(between)
        saver.wait_for_copy()
    while (outcome := saver.poll()) is None:  # `wait` would count as stall
        time.sleep(0.01)
    if outcome.error:
        raise RuntimeError(f"the save failed: {outcome}")
    return outcome.stall_seconds


def compute(seconds: float) -> None:
    """Multiply matrices on all threads for `seconds`, as a forward and backward pass does."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        a = torch.tanh(a @ b)


@contextmanager
def saves() -> Iterator[Saves]:
    """Yield the saves in a temporary folder, after each has run once."""
    with (
        tempfile.TemporaryDirectory() as folder,
        start_mesh(Layout(shard=1, precision="bf16")) as mesh,  # bf16: then there is a process group, which DCP wants
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # DCP's
        one = Saves(Path(folder), mesh)
        one.synchronous(), one.asynchronous(0.0), one.dcp_asynchronous()
        yield one


def stall(between: float) -> float:
    """Return the stall of an asynchronous save as a share of a synchronous one."""
    with saves() as one:
        return median_ratio(lambda: one.asynchronous(between), one.synchronous, PAIRS)


def stall_against_dcp() -> float:
    """Return the stall of our asynchronous save as a share of DCP's, with no training in between."""
    with saves() as one:
        return median_ratio(lambda: one.asynchronous(0.0), one.dcp_asynchronous, PAIRS)


def hashing() -> float:
    """Return what the hashes add to a synchronous save, as a share of a save without hashes."""
    with saves() as one:
        return median_ratio(one.synchronous, lambda: _unhashed(one.synchronous), PAIRS) - 1.0


def _unhashed(save: Callable[[], float]) -> float:
    real = hashlib.sha256
    hashlib.sha256 = lambda content=b"": real()  # type: ignore[assignment,misc]
    try:
        return save()
    finally:
        hashlib.sha256 = real


def memory(size: int = STATE_BYTES, saves: int = 2) -> float:
    """Return the peak memory that saves add to a fresh process, as a share of the state."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_remember, args=(theirs, size, saves), daemon=True)
    process.start()
    theirs.close()
    try:
        return float(ours.recv())
    finally:
        process.join()


def _remember(pipe: Connection, size: int, saves: int) -> None:
    pieces = {name: piece_of(tensor) for name, tensor in made_up_state(size).items()}
    with tempfile.TemporaryDirectory() as folder, start_mesh(Layout(shard=1)) as mesh:
        saver = AsyncSaver(Path(folder), mesh, 1)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        for step in range(1, saves + 1):
            _saved(saver, SaveRequest(step, {}), pieces, 0.0)
        pipe.send((_status("VmHWM") - before) / size)


def _status(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def main() -> int:
    """Check the claims whose name contains --only (default: all). Return 1 when a bound is broken."""
    return check_claims("What a save costs the training, as ratios.", CLAIMS)


CLAIMS = (
    Claim("save during a step, stall of a synchronous one", lambda: stall(FORWARD_BACKWARD_SECONDS), 0.10, "x"),
    Claim("save with nothing to compute, stall of a synchronous one", lambda: stall(0.0), 0.25, "x"),
    # 0.34 to 1.37 from run to run (LOG.md)
    Claim("save with nothing to compute, stall of DCP's", stall_against_dcp, 2.0, "x"),
    Claim("save, what hashing adds", hashing, 0.15, "x"),
    Claim("save, memory in addition to the state", memory, 1.05 + 96 / 256, "x"),
)

if __name__ == "__main__":
    sys.exit(main())
