"""Saves during training: one at a time, from a copy of the tensors, on a thread with a process group of its own."""

import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from minka.checkpoint.catalogue import Catalogue
from minka.checkpoint.filesystem import LOCAL, FileSystem, Heartbeat
from minka.checkpoint.manifest import CHUNK_BYTES
from minka.checkpoint.shard_file import ChunkHasher, StagingBuffer
from minka.checkpoint.write import SaveRequest, describe_error, write
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Pieces, to_write

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
        self.copied, self.ended = threading.Event(), threading.Event()
        self.outcome: Outcome | None = None


class AsyncSaver:
    """Every rank has one and calls it in the same order. A save that fails leaves no files and does not stop the run.

    `newest` is how many checkpoints are kept in addition to the permanent ones and to the last one, which is not proven
    before a later step has been accepted: so older ones are deleted before the next one is written. The staging buffer,
    as large as what this rank writes, is allocated at the first save and kept.
    """

    def __init__(
        self, folder: Path, mesh: Mesh, newest: int, *, asynchronous: bool = True, fs: FileSystem = LOCAL
    ) -> None:
        self.mesh, self.newest, self._catalogue = mesh, newest, Catalogue(folder, fs)
        self.asynchronous = asynchronous
        self._own_mesh = mesh.with_own_host_group()
        self._staged: StagingBuffer | None = None
        self._save: _Save | None = None

    def save(self, request: SaveRequest, tensors: Pieces, alive: Heartbeat = lambda: None) -> None:
        """Start a save; collective. `wait` or `poll` must have returned the outcome of the save before.

        No tensor may change until `wait_for_copy` has returned.
        """
        assert self._save is None
        save = self._save = _Save(request)
        mine = to_write(tensors)
        ready: torch.cuda.Event | None = None
        if any(piece.local.is_cuda for piece in mine.values()):  # offloaded ones are not
            ready = torch.cuda.Event()
            ready.record()
        if self.asynchronous:
            threading.Thread(target=self._run, args=(save, mine, ready, lambda: None), daemon=True).start()
        else:
            self._run(save, mine, ready, alive)
        save.stall_seconds += time.perf_counter() - save.started

    def wait_for_copy(self, alive: Heartbeat = lambda: None) -> None:
        """Return when the running save, if any, has its own copy of every tensor."""
        if self._save is not None:
            self._wait_until(self._save.copied, self._save, alive)

    def poll(self) -> Outcome | None:
        """The outcome of the running save once it has ended; None before, and when no save is running."""
        save = self._save
        if save is None or save.outcome is None:
            return None
        save.ended.wait()
        self._save = None
        total = max(save.outcome.total_seconds, save.stall_seconds)  # a waiting thread notices the end a little later
        return save.outcome._replace(stall_seconds=save.stall_seconds, total_seconds=total)

    def wait(self, alive: Heartbeat = lambda: None) -> Outcome | None:
        """`poll`, after the running save has ended; the time counts as stall."""
        if self._save is not None:
            self._wait_until(self._save.ended, self._save, alive)
        return self.poll()

    def prune(self) -> None:
        """Keep `newest` checkpoints, the last one among them; for the run's one writer, when no save is running."""
        self._catalogue.prune(self.newest)

    def close(self, seconds: float) -> Outcome | None:
        """`wait` for at most so many seconds, without a heartbeat."""
        if self._save is not None:
            self._save.ended.wait(seconds)
        return self.poll()

    def _wait_until(self, event: threading.Event, save: _Save, alive: Heartbeat) -> None:
        """Wait, with a heartbeat only when the save makes progress: one that hangs must be seen to hang."""
        started, seen = time.perf_counter(), save.progress
        while not event.wait(POLL_SECONDS):
            if save.progress != seen:
                seen = save.progress
                alive()
        save.stall_seconds += time.perf_counter() - started

    def _run(self, save: _Save, mine: Pieces, ready: torch.cuda.Event | None, alive: Heartbeat) -> None:
        def progress() -> None:
            save.progress += 1
            alive()

        path, size, problem = self._catalogue.folder, 0, ""
        with ExitStack() as stack:
            stack.callback(save.ended.set)
            hasher = None
            try:
                if self._staged is None or not self._staged.fits(mine):
                    self._staged = None  # never two buffers at once
                    self._staged = StagingBuffer(mine, pinned=ready is not None)
                hasher = ChunkHasher(self._staged, CHUNK_BYTES, progress)
                stack.callback(hasher.thread.shutdown, cancel_futures=True)
                if ready is None:
                    self._staged.copy_in(mine, hasher.filled)
                else:
                    stream = torch.cuda.Stream(self.mesh.device)
                    stream.wait_event(ready)
                    with torch.cuda.stream(stream):
                        self._staged.copy_in(mine)
                    stream.synchronize()
                hasher.filled(self._staged.buffer.numel())
            except Exception as error:  # no memory for the buffer
                problem = describe_error(error)
            save.copied.set()
            try:
                problem = self._own_mesh.first_error(problem)
                if hasher is None or problem:
                    raise OSError(problem)
                if self._own_mesh.is_first:
                    with suppress(Exception):  # a save does not depend on what happens to older ones
                        self.prune()
                path, size = write(self._catalogue, save.request, hasher, mine, self._own_mesh)
            except Exception as error:  # of any kind: the training continues, and the outcome says it
                problem = describe_error(error)
            save.outcome = Outcome(save.request, path, size, 0.0, time.perf_counter() - save.started, problem)
