"""Output that cannot be written: nothing is raised, nothing waits, and the command that it is run for says so."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

from commands import SOURCE, environment
from minka.plan.console_output import Descriptor


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    outside, inside = os.openpty()
    os.close(outside)
    return inside


@pytest.mark.parametrize(
    ("descriptor", "reason"),
    [
        (closed_pipe, errno.EPIPE),
        (closed_terminal, errno.EIO),
        (lambda: os.open("/dev/full", os.O_WRONLY), errno.ENOSPC),
    ],
)
@pytest.mark.parametrize("waits", [True, False])
def test_an_error_is_kept_and_not_raised(descriptor: Callable[[], int], reason: int, waits: bool) -> None:
    output = Descriptor(descriptor(), waits=waits)
    assert output.write(b"some\n") == 5
    assert output.write(b"more\n") == 5
    assert output.lost is not None
    assert output.lost.errno == reason


@pytest.mark.parametrize("opened", [os.pipe, os.openpty])
def test_a_reader_who_stops_reading_is_not_waited_for_and_may_resume(opened: Callable[[], tuple[int, int]]) -> None:
    reader, writer = opened()
    output = Descriptor(writer, waits=False)
    output.write(b"x" * 2**20)  # more than any pipe or terminal holds
    assert output.lost is not None
    os.set_blocking(reader, False)
    with pytest.raises(BlockingIOError):
        while os.read(reader, 2**16):
            pass
    output.write(b"read again")
    assert os.read(reader, 100).endswith(b"read again")
    assert os.get_blocking(writer), "the shell has this descriptor, too"


def test_what_a_command_is_run_for_waits_for_its_reader() -> None:
    reader, writer = os.pipe()
    output, read = Descriptor(writer, waits=True), bytearray()

    def late() -> None:
        while len(read) < 2**20:
            read.extend(os.read(reader, 2**16))

    thread = Thread(target=late)
    thread.start()
    output.write(b"x" * 2**20)
    thread.join(60)
    assert (len(read), output.lost) == (2**20, None)


def shell(line: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """Run a line of bash, in which $minka is the command."""
    words = ["bash", "-o", "pipefail", "-c", line.replace("$minka", f"{sys.executable} -m minka")]
    return subprocess.run(words, capture_output=True, text=True, env=environment(**more), timeout=120, check=False)


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("$minka --help > /dev/full", 1, "minka: standard output could not be written: No space left on device.\n"),
        ("$minka data inspect --help | true", 1, ""),
        ("$minka --help > /dev/full 2>&1", 1, ""),
        ("$minka train nothing > /dev/full 2>&-", 2, ""),
        ("$minka --version >&- 2>&- <&-", 0, ""),
    ],
)
def test_a_command_whose_output_is_lost_fails_in_a_line(line: str, status: int, said: str) -> None:
    done = shell(line)
    assert (done.returncode, done.stderr) == (status, said)


def test_text_that_the_locale_lacks_is_written(tmp_path: Path) -> None:
    done = shell("$minka train caf\u00e9\u2192", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert r"caf\xe9\u2192" in done.stderr


def test_a_file_does_not_get_the_number_of_a_closed_descriptor(tmp_path: Path) -> None:
    code = (
        "from minka.plan.console_output import install_output as i; i(); f = open('f', 'w'); print(1); exit(f.fileno())"
    )
    command = f'PYTHONPATH={SOURCE} exec {sys.executable} -c "{code}" <&- >&- 2>&-'
    status = subprocess.run(["bash", "-c", command], cwd=tmp_path, timeout=60, check=False).returncode
    assert status > 2
    assert (tmp_path / "f").read_text() == ""
