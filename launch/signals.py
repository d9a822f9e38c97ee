"""What reaches a rank from supervisor: the wish to stop, the supervisor's pipe, the request for stacks."""

import faulthandler
import os
import signal
from pathlib import Path

ASKING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP})


class SupervisorLink:
    """Counts wishes to stop and beats the heart. One for each rank; signal handlers live here and nowhere else."""

    def __init__(self, rank: int, stop_file: Path, beat: int | None, stacks: Path) -> None:
        self.rank, self.stop_file, self._beat = rank, stop_file, beat
        self._asked = False
        self._stacks = stacks.open("a")
        for number in ASKING:
            signal.signal(number, self._ask)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)

    def stop_requested(self) -> bool:
        """Whether this rank was signalled, or a person put a file called STOP into the run's folder (rank 0 looks)."""
        return self._asked or (self.rank == 0 and self.stop_file.exists())

    def heartbeat(self, step: int, *, done: bool = False) -> None:
        """Tell the supervisor; `done`: only the ending is left, which may take its time.

        Never waits: a full pipe drops the beat.
        """
        if self._beat is None:
            return
        try:
            os.write(self._beat, f"{self.rank} {os.getpid()} {step}{' done' * done}\n".encode())
        except (BlockingIOError, BrokenPipeError):
            return

    def close(self) -> None:
        """Signals no longer matter: the rank has only to end, and a late one must not undo how."""
        faulthandler.unregister(signal.SIGUSR2)
        for number in ASKING:
            signal.signal(number, signal.SIG_IGN)
        self._stacks.close()

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True
