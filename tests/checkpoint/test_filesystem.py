"""What a disk says for a moment is no damage: it is asked again, and what it keeps to itself keeps its name."""

import errno
from pathlib import Path

import pytest

from minka.checkpoint import filesystem
from minka.checkpoint.catalogue import Catalogue, find_checkpoint
from minka.checkpoint.filesystem import LOCAL, FileSystem
from minka.checkpoint.restore import restore
from minka.plan.errors import UserError
from minka.plan.retention import Kept
from saved import ALONE, save, silent, tensors


class MoodyFileSystem(FileSystem):
    """Refuses the first `times` reads of files of `step`."""

    def __init__(self, step: str, times: int, number: int = errno.EIO) -> None:
        self.step, self.times, self.number = step, times, number
        self.asked: list[str] = []

    def _read(self, file: Path, offset: int, length: int) -> bytearray:
        self.asked.append(file.parent.name)
        if file.parent.name == self.step and self.times:
            self.times -= 1
            raise OSError(self.number, "not just now", str(file))
        return super()._read(file, offset, length)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two checkpoints, and no pauses."""
    monkeypatch.setattr(filesystem, "PAUSES", (0.0, 0.0))
    for step in (1, 2):
        save(tmp_path, step, tensors(step), {"step": step}, ALONE)
    return tmp_path


@pytest.mark.parametrize("times", [1, 2])
def test_a_read_that_fails_once_or_twice_is_tried_again(times: int, folder: Path) -> None:
    assert restore(folder, tensors(), ALONE, silent, fs=MoodyFileSystem("step-00000002", times)) == {"step": 2}


def test_what_cannot_be_read_is_passed_over_and_keeps_its_name(folder: Path) -> None:
    passed: list[str] = []
    fs = MoodyFileSystem("step-00000002", 10**9, errno.ESTALE)
    assert restore(folder, tensors(), ALONE, lambda path, reason: passed.append(reason), fs=fs) == {"step": 1}
    assert "not just now" in passed[0]
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
    assert restore(folder, tensors(), ALONE, silent) == {"step": 2}  # another day


def test_what_is_gone_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", pytest.fail)
    with pytest.raises(FileNotFoundError):
        LOCAL.read(folder / "nothing", 0, 1)


def test_each_manifest_is_read_once_however_many_saves_follow(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, tensors(), {}, ALONE, permanent=True)
    fs = MoodyFileSystem("", 0)
    catalogue = Catalogue(tmp_path, fs)
    numbers = [catalogue.next_number() for _ in range(3)]
    catalogue.add(Kept(4, numbers[-1]))
    catalogue.prune(1)
    assert fs.asked == ["step-00000001", "step-00000002", "step-00000003"]
    assert numbers == sorted(numbers)


def test_the_newest_without_a_manifest_is_named_not_passed_over(folder: Path) -> None:
    (folder / "step-00000009").mkdir()
    with pytest.raises(UserError, match=r"step-00000009/manifest\.json.*damaged.*steps saved here: 1, 2"):
        find_checkpoint(folder)
    assert find_checkpoint(folder, "2").name == "step-00000002"
