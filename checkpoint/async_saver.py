"""Saves beside the training: one at a time, from a copy of the tensors, on a thread and a process group of its own."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from minka.checkpoint.catalogue import Catalogue
from minka.checkpoint.filesystem import LOCAL, Disk
from minka.checkpoint.manifest import CHUNK_BYTES
from minka.checkpoint.shard_file import Hashes, Image
from minka.checkpoint.write import Contents, write
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, to_write

POLL_SECONDS = 0.02


class Outcome(NamedTuple):
    """How a save ended; `error` is empty when it is committed. Seconds of this rank, bytes of all."""

    contents: Contents
    path: Path
    bytes: int
    stall_seconds: float  # for which the training waited
    total_seconds: float
    error: str


class _Saving:
    """A save under way: what its thread and the training tell each other."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self.began = time.perf_counter()
        self.stall_seconds = 0.0
        self.progress = 0  # grows while the thread gets on; what a heartbeat is given for
        self.copied = threading.Event()
        self.outcome: Outcome | None = None
        self.thread: threading.Thread | None = None


class Saver:
    """Every rank has one, and calls it in the same order. A save that fails leaves no trace and stops nothing.

    `newest` is how many checkpoints stay beside the permanent ones. The staging buffer, as large as what this rank
    writes, is made at the first save and kept.
    """

    def __init__(self, folder: Path, mesh: Mesh, newest: int, *, asynchronous: bool = True, disk: Disk = LOCAL) -> None:
        self.mesh, self.newest, self._catalogue = mesh, newest, Catalogue(folder, disk)
        self.asynchronous = asynchronous
        self._beside = mesh.with_own_host_group()
        self._image: Image | None = None
        self._saving: _Saving | None = None

    @property
    def stall_seconds(self) -> float:
        """For which the training has waited so far, in the save under way."""
        return self._saving.stall_seconds if self._saving else 0.0

    def save(self, contents: Contents, tensors: Mapping[str, Piece], alive: Callable[[], None] = lambda: None) -> None:
        """Begin to save; collective. `wait` or `poll` must have given the outcome of the save before.

        Until `wait_for_copy` has returned, no tensor may change.
        """
        assert self._saving is None
        saving = self._saving = _Saving(contents)
        mine = to_write(tensors)
        on_gpu = any(piece.local.is_cuda for piece in mine.values())  # offloaded ones are not
        ready = torch.cuda.Event() if on_gpu else None
        if ready is not None:
            ready.record()
        if self.asynchronous:
            saving.thread = threading.Thread(target=self._run, args=(saving, mine, ready), daemon=True)
            saving.thread.start()
        else:
            self._run(saving, mine, ready, alive)
        saving.stall_seconds += time.perf_counter() - saving.began

    def wait_for_copy(self, alive: Callable[[], None] = lambda: None) -> None:
        """Return when the save under way, if there is one, has its own copy of every tensor."""
        saving = self._saving
        if saving is None or saving.copied.is_set():
            return
        began = time.perf_counter()
        self._await(saving.copied.wait, saving, alive)
        saving.stall_seconds += time.perf_counter() - began

    def poll(self) -> Outcome | None:
        """The outcome of the save under way once it is known here; then there is none under way."""
        saving = self._saving
        if saving is None or saving.outcome is None:
            return None
        if saving.thread is not None:
            saving.thread.join()
        self._saving = None
        total = max(saving.outcome.total_seconds, saving.stall_seconds)  # who waited heard of the end a moment later
        return saving.outcome._replace(stall_seconds=saving.stall_seconds, total_seconds=total)

    def wait(self, alive: Callable[[], None] = lambda: None) -> Outcome | None:
        """`poll`, when the save under way has ended; the time counts as stall."""
        saving = self._saving
        if saving is not None and saving.thread is not None and saving.outcome is None:
            began = time.perf_counter()
            thread = saving.thread

            def ended(seconds: float) -> bool:
                thread.join(seconds)
                return not thread.is_alive()

            self._await(ended, saving, alive)
            saving.stall_seconds += time.perf_counter() - began
        return self.poll()

    def close(self, seconds: float) -> Outcome | None:
        """`wait`, for so long at most, without a heartbeat."""
        if self._saving is not None and self._saving.thread is not None:
            self._saving.thread.join(seconds)
        return self.poll()

    def _await(self, over: Callable[[float], bool], saving: _Saving, alive: Callable[[], None]) -> None:
        """Wait with a heartbeat for each sign of life: a save that hangs must look like one."""
        seen = saving.progress
        while not over(POLL_SECONDS):
            if saving.progress != seen:
                seen = saving.progress
                alive()

    def _run(
        self,
        saving: _Saving,
        mine: Mapping[str, Piece],
        ready: torch.cuda.Event | None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        def on() -> None:
            saving.progress += 1
            alive()

        path, size, problem = self._catalogue.folder, 0, ""
        with ExitStack() as stack:
            hashes = None
            try:
                hashes = stack.enter_context(Hashes(self._room(mine, ready), CHUNK_BYTES, on))
                self._copy(hashes, mine, ready)
            except Exception as error:  # no memory for the buffer
                problem = _words(error)
            saving.copied.set()
            try:
                problem = self._beside.first_error(problem)
                if hashes is None or problem:
                    raise OSError(0, problem)
                path, size = write(self._catalogue, saving.contents, hashes, mine, self._beside, alive=on)
                if self._beside.is_first:
                    with suppress(Exception):  # the save is committed, whatever becomes of older ones
                        self._catalogue.prune(self.newest)
            except Exception as error:  # whatever it is: the training goes on, and hears of it
                problem = _words(error)
        took = time.perf_counter() - saving.began
        saving.outcome = Outcome(saving.contents, path, size, 0.0, took, problem)

    def _room(self, mine: Mapping[str, Piece], ready: torch.cuda.Event | None) -> Image:
        if self._image is None or not self._image.fits(mine):
            self._image = None  # never two buffers at once
            self._image = Image(mine, pinned=ready is not None)
        return self._image

    def _copy(self, hashes: Hashes, mine: Mapping[str, Piece], ready: torch.cuda.Event | None) -> None:
        if ready is None:
            hashes.image.take(mine, hashes.upto)
            return
        stream = torch.cuda.Stream(self.mesh.device)
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            hashes.image.take(mine)
        stream.synchronize()
        hashes.upto(hashes.image.buffer.numel())


def _words(error: Exception) -> str:
    """An error for the ledger; errno 0 is this project's own, and says nothing."""
    if isinstance(error, OSError):
        own = error.strerror if not error.errno else ""
        return f"{own}: {error.filename}" if own and error.filename else own or str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"
