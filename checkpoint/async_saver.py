"""Saves during training: one at a time, from a copy of the tensors, on a thread with a process group of its own."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from minka.checkpoint.catalogue import Catalogue
from minka.checkpoint.filesystem import LOCAL, FileSystem
from minka.checkpoint.manifest import CHUNK_BYTES
from minka.checkpoint.shard_file import ChunkHasher, StagingBuffer
from minka.checkpoint.write import SaveRequest, write
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, to_write

POLL_SECONDS = 0.02


class Outcome(NamedTuple):
    """How a save ended; `error` is empty when it is committed. Seconds of this rank, bytes of all ranks."""

    request: SaveRequest
    path: Path
    bytes: int
    stall_seconds: float  # for which the training waited
    total_seconds: float
    error: str


class _Save:
    """A running save: what its thread and the training's share."""

    def __init__(self, request: SaveRequest) -> None:
        self.request = request
        self.started = time.perf_counter()
        self.stall_seconds = 0.0
        self.progress = 0  # grows with each chunk; a heartbeat follows it
        self.copied = threading.Event()
        self.outcome: Outcome | None = None
        self.thread: threading.Thread | None = None


class AsyncSaver:
    """Every rank has one and calls it in the same order. A save that fails leaves no files and does not stop the run.

    `newest` is how many checkpoints are kept in addition to the permanent ones. The staging buffer, as large as what
    this rank writes, is allocated at the first save and kept.
    """

    def __init__(
        self, folder: Path, mesh: Mesh, newest: int, *, asynchronous: bool = True, fs: FileSystem = LOCAL
    ) -> None:
        self.mesh, self.newest, self._catalogue = mesh, newest, Catalogue(folder, fs)
        self.asynchronous = asynchronous
        self._own_mesh = mesh.with_own_host_group()
        self._staged: StagingBuffer | None = None
        self._save: _Save | None = None

    @property
    def stall_seconds(self) -> float:
        """Seconds for which the training has waited so far in the running save."""
        return self._save.stall_seconds if self._save else 0.0

    def save(
        self, request: SaveRequest, tensors: Mapping[str, Piece], alive: Callable[[], None] = lambda: None
    ) -> None:
        """Start a save; collective. `wait` or `poll` must have returned the outcome of the save before.

        No tensor may change until `wait_for_copy` has returned.
        """
        assert self._save is None
        save = self._save = _Save(request)
        mine = to_write(tensors)
        on_gpu = any(piece.local.is_cuda for piece in mine.values())  # offloaded ones are not
        ready = torch.cuda.Event() if on_gpu else None
        if ready is not None:
            ready.record()
        if self.asynchronous:
            save.thread = threading.Thread(target=self._run, args=(save, mine, ready), daemon=True)
            save.thread.start()
        else:
            self._run(save, mine, ready, alive)
        save.stall_seconds += time.perf_counter() - save.started

    def wait_for_copy(self, alive: Callable[[], None] = lambda: None) -> None:
        """Return when the running save, if any, has its own copy of every tensor."""
        save = self._save
        if save is not None and not save.copied.is_set():
            self._wait_until(save.copied.wait, save, alive)

    def poll(self) -> Outcome | None:
        """The outcome of the running save once it has ended; None before, and when no save is running."""
        save = self._save
        if save is None or save.outcome is None:
            return None
        if save.thread is not None:
            save.thread.join()
        self._save = None
        total = max(save.outcome.total_seconds, save.stall_seconds)  # a waiting thread notices the end a little later
        return save.outcome._replace(stall_seconds=save.stall_seconds, total_seconds=total)

    def wait(self, alive: Callable[[], None] = lambda: None) -> Outcome | None:
        """`poll`, after the running save has ended; the time counts as stall."""
        save = self._save
        if save is not None and save.thread is not None and save.outcome is None:
            thread = save.thread

            def ended(seconds: float) -> bool:
                thread.join(seconds)
                return not thread.is_alive()

            self._wait_until(ended, save, alive)
        return self.poll()

    def close(self, seconds: float) -> Outcome | None:
        """`wait` for at most so many seconds, without a heartbeat."""
        if self._save is not None and self._save.thread is not None:
            self._save.thread.join(seconds)
        return self.poll()

    def _wait_until(self, ended: Callable[[float], bool], save: _Save, alive: Callable[[], None]) -> None:
        """Wait, with a heartbeat only when the save makes progress: one that hangs must be seen to hang."""
        started, seen = time.perf_counter(), save.progress
        while not ended(POLL_SECONDS):
            if save.progress != seen:
                seen = save.progress
                alive()
        save.stall_seconds += time.perf_counter() - started

    def _run(
        self,
        save: _Save,
        mine: Mapping[str, Piece],
        ready: torch.cuda.Event | None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        def progress() -> None:
            save.progress += 1
            alive()

        path, size, problem = self._catalogue.folder, 0, ""
        with ExitStack() as stack:
            hasher = None
            try:
                hasher = stack.enter_context(ChunkHasher(self._buffer_for(mine, ready), CHUNK_BYTES, progress))
                self._copy(hasher, mine, ready)
            except Exception as error:  # no memory for the buffer
                problem = _describe(error)
            save.copied.set()
            try:
                problem = self._own_mesh.first_error(problem)
                if hasher is None or problem:
                    raise OSError(0, problem)
                path, size = write(self._catalogue, save.request, hasher, mine, self._own_mesh, alive=progress)
                if self._own_mesh.is_first:
                    with suppress(Exception):  # the save is committed, whatever happens to older ones
                        self._catalogue.prune(self.newest)
            except Exception as error:  # of any kind: the training continues, and the outcome says it
                problem = _describe(error)
        took = time.perf_counter() - save.started
        save.outcome = Outcome(save.request, path, size, 0.0, took, problem)

    def _buffer_for(self, mine: Mapping[str, Piece], ready: torch.cuda.Event | None) -> StagingBuffer:
        if self._staged is None or not self._staged.fits(mine):
            self._staged = None  # never two buffers at once
            self._staged = StagingBuffer(mine, pinned=ready is not None)
        return self._staged

    def _copy(self, hasher: ChunkHasher, mine: Mapping[str, Piece], ready: torch.cuda.Event | None) -> None:
        if ready is None:
            hasher.staged.copy_in(mine, hasher.filled)
            return
        stream = torch.cuda.Stream(self.mesh.device)
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            hasher.staged.copy_in(mine)
        stream.synchronize()
        hasher.filled(hasher.staged.buffer.numel())


def _describe(error: Exception) -> str:
    """An error for the ledger; errno 0 is this project's own and is left out."""
    if isinstance(error, OSError):
        own = error.strerror if not error.errno else ""
        return f"{own}: {error.filename}" if own and error.filename else own or str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"
