"""A rank's link to its supervisor: stop signals and requests for stacks come in, heartbeats go out."""

import faulthandler
import os
import signal
from pathlib import Path

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP})  # each: save and stop


class SupervisorLink:
    """One for each rank. Nothing else in a rank handles signals."""

    def __init__(self, rank: int, stop_file: Path, pipe: int | None, stacks: Path) -> None:
        self.rank, self.stop_file, self._pipe = rank, stop_file, pipe
        self._signalled = False
        self._stacks = stacks.open("a")
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)

    def stop_requested(self) -> bool:
        """Whether this rank got a stop signal, or (on rank 0) the run's folder has a file called STOP."""
        return self._signalled or (self.rank == 0 and self.stop_file.exists())

    def heartbeat(self, step: int, *, done: bool = False) -> None:
        """Tell the supervisor that this rank is alive. `done`: it only has to exit, which may take long.

        Never waits: when the pipe is full, the heartbeat is dropped.
        """
        if self._pipe is None:
            return
        try:
            os.write(self._pipe, f"{self.rank} {os.getpid()} {step}{' done' * done}\n".encode())
        except (BlockingIOError, BrokenPipeError):
            return

    def close(self) -> None:
        """Ignore signals from here on: a late one must not change the exit status."""
        faulthandler.unregister(signal.SIGUSR2)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._stacks.close()

    def _note(self, number: int, frame: object) -> None:
        self._signalled = True
