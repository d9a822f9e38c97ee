"""A rank's link to its supervisor: stop signals and requests for stacks come in, heartbeats go out."""

import faulthandler
import os
import signal
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

# Each: save and stop. SIGXCPU is the warning of a limit on CPU time.
STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU})
STACKS_SIGNAL = signal.SIGUSR2  # a rank appends its stacks to its file in logs/
ABOVE_RANKS = STOP_SIGNALS | {STACKS_SIGNAL}  # of supervisor and forker: SIGUSR2 is SGE's and LSF's warning
# By `nohup`, or in the background of a script. Asked when this module is imported, before minka sets any.
IGNORED_FROM_THE_START = frozenset(number for number in ABOVE_RANKS if signal.getsignal(number) == signal.SIG_IGN)


def for_ranks(number: int) -> int:
    """The signal that stops the ranks when a process above them gets `number`."""
    return signal.SIGTERM if number == STACKS_SIGNAL else number


def handle_stop_signals(
    handler: Callable[[int, object], None] | signal.Handlers, numbers: Collection[signal.Signals] = STOP_SIGNALS
) -> None:
    """Set the handler of all of them, but of those that the process was started to ignore.

    At its end a process ignores them: a late one must not change its exit status.
    """
    for number in set(numbers) - IGNORED_FROM_THE_START:
        signal.signal(number, handler)


class SupervisorLink:
    """One for each rank. Nothing else in a rank handles signals."""

    def __init__(self, rank: int, stop_file: Path, pipe: int | None, stacks: Path, launcher: int | None = None) -> None:
        """`launcher`: the process of torchrun or Slurm that has started this rank, where there is no supervisor."""
        self.rank, self.stop_file, self._pipe, self._launcher = rank, stop_file, pipe, launcher
        self._signalled = False
        try:
            stacks.parent.mkdir(exist_ok=True)
            stacks.touch()
        except OSError:  # a full disk, which shall not end a run that needs no stacks
            stacks = Path(os.devnull)
        self._stacks = stacks.open("a")
        # Where no supervisor asks for stacks, a scheduler's SIGUSR2 reaches the ranks themselves.
        self._stops = STOP_SIGNALS if pipe is not None else ABOVE_RANKS
        handle_stop_signals(self._note, self._stops)
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True, chain=pipe is None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ABOVE_RANKS)

    def stop_requested(self) -> bool:
        """Whether this rank got a stop signal or lost its launcher, or (on rank 0) the run's folder has a STOP file."""
        orphaned = self._launcher is not None and os.getppid() != self._launcher  # torchrun dies of SIGUSR1
        return self._signalled or orphaned or (self.rank == 0 and self.stop_file.exists())

    def heartbeat(self, step: int, *, done: bool = False) -> None:
        """Say that this rank is alive. `done`: it only has to exit. Never waits: a full pipe drops the heartbeat."""
        if self._pipe is not None:
            with suppress(BlockingIOError, BrokenPipeError):
                os.write(self._pipe, f"{self.rank} {os.getpid()} {step}{' done' * done}\n".encode())

    def close(self) -> None:
        """Ignore signals from here on."""
        faulthandler.unregister(STACKS_SIGNAL)
        handle_stop_signals(signal.SIG_IGN, self._stops)
        self._stacks.close()

    def _note(self, number: int, frame: object) -> None:
        self._signalled = True
