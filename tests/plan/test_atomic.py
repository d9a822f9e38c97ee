"""Atomic folders: published whole or not at all, replaced only where that is allowed."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from minka.plan.atomic import atomic_folder, is_running
from minka.plan.errors import UserError


def test_the_second_process_keeps_the_folder_of_the_first(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "store") as new:
        (new.path / "mine").write_text("second")
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "theirs").write_text("first")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "store", tmp_path / "store" / "theirs"]


def test_a_failed_write_deletes_the_parents_that_it_made_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(UserError) as caught, atomic_folder(tmp_path / "old" / "a" / "b", remedy="use c") as new:
        (new.path / "part").write_bytes(bytes(2**20))
        new.done = 0.25
        raise OSError(errno.ENOSPC, "full")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "old"]
    assert caught.value.where == str(tmp_path / "old" / "a" / "b")
    assert "4.0 MiB are needed" in caught.value.why
    assert "use c" in caught.value.remedy


def test_a_folder_is_checked_again_before_it_is_replaced(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        if (folder / "thesis.txt").exists():
            raise UserError("this folder is in use")

    out = tmp_path / "out"
    for text in ("first", "second"):
        with atomic_folder(out, check_replaceable=check) as new:
            (new.path / "file").write_text(text)
        assert [file.read_text() for file in out.iterdir()] == [text]
    with pytest.raises(UserError), atomic_folder(out, check_replaceable=check) as new:
        (new.path / "file").write_text("third")
        (out / "thesis.txt").write_text("years of work")
    assert {file.name: file.read_text() for file in out.iterdir()} == {"file": "second", "thesis.txt": "years of work"}
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="other systems do not say it")
def test_a_killed_process_that_nobody_has_waited_for_is_not_running() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        assert is_running(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still in the table
        assert not is_running(process.pid)
