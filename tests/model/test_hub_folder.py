"""An export replaces what an earlier export wrote and nothing else, and never leaves a partial folder."""

import errno
import json
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from minka.model import hub_folder
from minka.model.hub_folder import write_folder
from minka.plan.errors import UserError
from minka.plan.run_folder import EXPORT_MARKER
from models import section


def refuse(name: str) -> tuple[str, torch.Tensor]:
    raise AssertionError(f"{name} was asked for")


def untouched() -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that must not be read."""
    return map(refuse, ["norm.weight"])


def other_files(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").touch()


def no_marker(out: Path) -> None:
    """As save_pretrained of a different program leaves it."""
    write_folder(out, section(), [], eod_token=0)
    (out / EXPORT_MARKER).unlink()


def spoilt_marker(out: Path) -> None:
    write_folder(out, section(), [], eod_token=0)
    (out / EXPORT_MARKER).write_text("[]")


def here(out: Path) -> None:
    out.mkdir()
    os.chdir(out)


@pytest.mark.parametrize("make", [other_files, no_marker, spoilt_marker, here, Path.touch])
def test_a_folder_that_no_export_wrote_is_left_alone(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "out")
    before = sorted((path, path.stat().st_ino) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        write_folder(Path() if make is here else tmp_path / "out", section(), untouched(), eod_token=0)
    assert str(tmp_path / "out") in str(caught.value)
    assert sorted((path, path.stat().st_ino) for path in tmp_path.rglob("*")) == before


def test_an_empty_folder_and_an_export_are_replaced_and_say_where_they_came_from(tmp_path: Path) -> None:
    out, link = tmp_path / "out", tmp_path / "link"
    out.mkdir()
    link.symlink_to(out)
    for source in ("first", "second"):
        write_folder(link, section(), [], eod_token=0, source=source, sha256="a" * 64)
        noted = {"format": 1, "source": source, "sha256": "a" * 64}
        assert json.loads((out / EXPORT_MARKER).read_text()) == noted
    assert link.is_symlink()


def test_leftovers_of_dead_processes_are_deleted_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = re.sub(r"[^\w-]", "-", socket.gethostname())
    writers = (f"{ended.pid}.", f"{host}.{ended.pid}.")  # earlier versions wrote no host
    deleted = [f".out[1].{by}{rest}partial" for by in writers for rest in ("", "old.", "0a1b.", "0a1b.old.")]
    kept = [f".out1.{ended.pid}.partial", f".out[1].{os.getppid()}.0a1b.partial", ".out[1].x.partial"]
    kept += [f".out[1].{host}.{os.getppid()}.0a1b.partial", f".out[1].not-{host}.{ended.pid}.0a1b.partial"]
    for name in (*deleted, *kept):
        (tmp_path / name).mkdir()
    write_folder(tmp_path / "out[1]", section(), [], eod_token=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "out[1]"])


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[str, torch.Tensor]]:
        yield "norm.weight", torch.ones(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", section(), interrupted(), eod_token=0)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "out", section(), [], eod_token=0, source="old")
    rename = Path.rename

    def refusing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial") and not self.name.endswith(".old.partial") and target.name == "out":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(UserError):
        write_folder(tmp_path / "out", section(), [], eod_token=0, source="new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / EXPORT_MARKER).read_text())["source"] == "old"


def test_a_read_only_place_and_a_full_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^/proc/out: "):
        write_folder(Path("/proc/out"), section(), untouched(), eod_token=0)

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hub_folder, "save_file", full)
    with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)):
        write_folder(tmp_path / "out", section(), [], eod_token=0)
    assert list(tmp_path.iterdir()) == []
