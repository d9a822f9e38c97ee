"""Standard output and standard error that cannot end, slow or garble the work of the process that writes to them."""

import errno
import io
import os
import select
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

PATIENCE_SECONDS = 1.0  # that a reader who has stopped reading may hold up the work, once
CHUNK_BYTES = 512  # a pipe that is ready takes at least as many at once (POSIX: PIPE_BUF)


class Descriptor(io.RawIOBase):
    """Writes to a file descriptor, and keeps the first error instead of raising it.

    `waits`: for its reader, however long that takes. Otherwise what is not read is dropped, until it is read again.
    """

    def __init__(self, number: int, *, waits: bool) -> None:
        self.number, self.waits = number, waits
        self.lost: OSError | None = None
        self._handle = number if waits else _not_blocking(number)
        self._patience = PATIENCE_SECONDS

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def write(self, data: Any) -> int:
        """Write what can be written. Return len(data), whatever came of it."""
        left = memoryview(data)
        try:
            while left:
                if not self.waits and not select.select([], [self._handle], [], self._patience)[1]:
                    raise BlockingIOError(errno.EAGAIN, "nobody reads it")
                left = left[os.write(self._handle, left[:CHUNK_BYTES]) :]
                self._patience = PATIENCE_SECONDS
        except OSError as error:
            self.lost, self._patience = self.lost or error, 0.0
        return len(data)


def install_output(*, waits: bool = True) -> None:
    """Replace sys.stdout and sys.stderr. A character that the locale lacks is written as its code.

    `waits`: standard output is what the command is run for. Standard error is not waited for. Descriptors that the
    caller has closed become /dev/null: the next file to be opened would get their numbers, and what is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # `stty tostop` would stop a job in the background that prints
    for name, number in (("stdout", 1), ("stderr", 2)):
        encoding = getattr(getattr(sys, name), "encoding", None) or "utf-8"
        raw: Any = Descriptor(number, waits=waits and number == 1)
        setattr(sys, name, io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True))


def only_reports() -> None:
    """From here on, standard output reports work that is worth more than it."""
    if any(_installed()):
        install_output(waits=False)


def lost_output() -> str:
    """Why output of this process has been lost; empty where none has."""
    return "; ".join(f"{_name(one)}: {one.lost.strerror}" for one in _installed() if one.lost)


def status_with_output(status: int) -> int:
    """The exit status of a command: 1 where all went well, but the output that it is run for could not be written."""
    for one in _installed():
        if status == 0 and one.lost and one.waits:
            if one.lost.errno != errno.EPIPE:  # the reader has seen enough (`| head`)
                print(f"minka: {_name(one)} could not be written: {one.lost.strerror}.", file=sys.stderr)
            return 1
    return status


def _installed() -> Iterator[Descriptor]:
    for stream in (sys.stdout, sys.stderr):
        buffer = getattr(stream, "buffer", None)
        if isinstance(buffer, Descriptor):
            stream.flush()
            yield buffer


def _name(descriptor: Descriptor) -> str:
    return "standard output" if descriptor.number == 1 else "standard error"


def _not_blocking(number: int) -> int:
    """A handle of the same pipe or terminal that never blocks, where there can be one. The shell has `number` too."""
    if os.isatty(number) or stat.S_ISFIFO(os.fstat(number).st_mode):
        with suppress(OSError):
            return os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return number
