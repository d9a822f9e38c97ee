"""checkpoint.folder: a run's checkpoints on another disk, and what happens when that disk is not there."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from minka.checkpoint.catalogue import find_checkpoint, steps_of
from minka.launch.supervisor import Job
from minka.plan import checkpoint_disk
from minka.plan.checkpoint_disk import check_place, claim_place, find_place, link_place
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.run_folder import RunFolder
from minka.train import worker
from minka.train.start_or_resume import read_and_check
from minka.train.worker import work
from ranks import on_ranks
from tiny import tiny, train_rank


def on_disk(place: Path, disk: str, **run: object) -> RunConfig:
    kept = {"folder": disk, "every_steps": 3, "export": True}
    return tiny(place, run={"max_steps": 6, **run}, checkpoint=kept)


def from_scratch(config: RunConfig) -> int:
    return work(Job(config=config, threads=1, from_scratch=True))


def test_a_run_saves_resumes_and_restarts_on_its_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    config = on_disk(tmp_path, str(disk))
    folder = RunFolder.of(config)
    with pytest.raises(UserError, match="there is no folder"):
        read_and_check(Job(config=config))  # before anything is prepared
    disk.mkdir()
    assert on_ranks(train_rank, 1, config) == [ExitStatus.DONE]
    assert os.readlink(folder.checkpoints) == str(disk / "tiny")
    assert steps_of(disk / "tiny") == steps_of(folder.checkpoints) == [3, 6]
    longer = on_disk(tmp_path, str(disk), max_steps=9)
    assert on_ranks(train_rank, 2, longer) == [ExitStatus.DONE] * 2
    assert steps_of(disk / "tiny") == [6, 9]
    assert on_ranks(from_scratch, 1, config) == [ExitStatus.DONE]
    assert steps_of(folder.path / "checkpoints.old-1") == steps_of(disk / "tiny") == [6, 9]
    assert os.readlink(folder.checkpoints) == str(disk / "tiny.1")
    assert steps_of(folder.checkpoints) == [3, 6]

    disk.rename(tmp_path / "unmounted")
    disk.mkdir()  # an empty place to mount it
    for given in ({"max_steps": 9}, {"from_scratch": True}):
        job = Job(config=on_disk(tmp_path, str(disk), max_steps=9), from_scratch="from_scratch" in given)
        folder.exit_file.unlink(missing_ok=True)
        with pytest.raises(UserError, match="which is not there") as caught:
            read_and_check(job)
        assert caught.value.status == ExitStatus.NEEDS_PERSON
    with pytest.raises(UserError, match="which is not there"):
        find_checkpoint(folder.checkpoints)
    assert list(disk.iterdir()) == []


def test_a_finished_run_whose_disk_is_not_mounted_is_over_and_does_not_restart(tmp_path: Path) -> None:
    config = on_disk(tmp_path, str(tmp_path / "disk"))
    folder = RunFolder.of(config)
    folder.create(config, {})
    folder.exit_file.write_text('{"code": 0}')
    folder.ledger_file.write_text('{"event": "stop", "time": 1.0, "step": 6, "tokens": 96}\n')
    folder.checkpoints.symlink_to(tmp_path / "disk" / "tiny")
    assert read_and_check(Job(config=config)).decision.over
    with pytest.raises(UserError, match="which is not there"):
        read_and_check(Job(config=config, from_scratch=True))


def test_two_runs_of_one_name_do_not_share_a_place(tmp_path: Path) -> None:
    """Not even before the first of them has saved; a creation that was cut off is finished by the same run."""
    (tmp_path / "disk").mkdir()
    ours, theirs = (on_disk(tmp_path, str(tmp_path / "disk"), folder=str(tmp_path / runs)) for runs in ("a", "b"))
    for config in (ours, theirs):
        RunFolder.of(config).make()
    link_place(ours, claim_place(ours))
    RunFolder.of(ours).checkpoints.unlink()
    link_place(ours, claim_place(ours))
    with pytest.raises(UserError, match="may hold the checkpoints of a different run"):
        find_place(theirs)
    assert not os.path.lexists(RunFolder.of(theirs).checkpoints)


def test_of_two_first_starts_at_once_one_gets_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has seen it free before the first claims it."""
    (tmp_path / "disk").mkdir()
    ours, theirs = (on_disk(tmp_path, str(tmp_path / "disk"), folder=str(tmp_path / runs)) for runs in ("a", "b"))
    seen, really = [find_place(theirs)], find_place
    assert claim_place(ours) == seen[0]
    monkeypatch.setattr(
        checkpoint_disk, "find_place", lambda config, again: seen.pop() if seen else really(config, again=again)
    )
    with pytest.raises(UserError, match="may hold the checkpoints of a different run"):
        claim_place(theirs)


def test_a_copy_of_a_run_does_not_train_with_the_checkpoints_of_the_original(tmp_path: Path) -> None:
    """`cp -a` copies the link. A run that was moved takes its link along, and is named at the place."""
    (tmp_path / "disk").mkdir()
    config = on_disk(tmp_path, str(tmp_path / "disk"))
    folder, other = RunFolder.of(config), RunFolder(tmp_path / "runs" / "other")
    assert on_ranks(train_rank, 1, config) == [ExitStatus.DONE]
    shutil.copytree(folder.path, other.path, symlinks=True)
    copied = on_disk(tmp_path, str(tmp_path / "disk"), name="other", max_steps=9)
    for asked in ({}, {"from_scratch": True}, {"return_to": 3}):
        with pytest.raises(UserError, match=f"these are the checkpoints of {folder.path}") as caught:
            read_and_check(Job(config=copied, **asked))
        assert caught.value.status == ExitStatus.NEEDS_PERSON
    shutil.copytree(other.path, tmp_path / "runs" / "third", symlinks=True)
    before = {file: file.read_bytes() for file in (tmp_path / "disk").rglob("*") if file.is_file()}
    subprocess.run(caught.value.remedy.rpartition(": ")[2].replace("/other/", "/third/"), shell=True, check=True)
    copied_whole = on_disk(tmp_path, str(tmp_path / "disk"), name="third", max_steps=9)
    assert on_ranks(train_rank, 1, copied_whole) == [ExitStatus.DONE]
    assert steps_of(RunFolder.of(copied_whole).checkpoints) == [6, 9]
    assert {file: file.read_bytes() for file in (tmp_path / "disk").rglob("*") if file.is_file()} == before
    shutil.rmtree(folder.path)  # from here on it was moved
    assert on_ranks(train_rank, 1, copied) == [ExitStatus.DONE]
    assert (tmp_path / "disk" / "tiny" / ".run").samefile(other.path)


def test_a_restart_for_which_there_is_no_place_leaves_all_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    config = on_disk(tmp_path, str(tmp_path / "disk"))
    folder = RunFolder.of(config)
    assert on_ranks(train_rank, 1, config) == [ExitStatus.DONE]
    before = [folder.exit_file.read_bytes(), folder.ledger_file.read_bytes(), os.readlink(folder.checkpoints)]
    assert on_ranks(from_scratch_without_place, 1, config) == ["the disk is full"]
    assert before == [folder.exit_file.read_bytes(), folder.ledger_file.read_bytes(), os.readlink(folder.checkpoints)]


def from_scratch_without_place(config: RunConfig) -> str:
    """One rank of `--from-scratch`, which is refused once it holds the run's lock."""

    def refused(*_: object, **__: object) -> None:
        raise UserError("the disk is full")

    worker.claim_place = refused  # type: ignore[attr-defined]
    try:
        return str(from_scratch(config))
    except UserError as error:
        return error.what


@pytest.mark.parametrize("relinked", [True, False])
def test_a_restart_puts_checkpoints_where_the_others_are_or_leaves_all_as_it_was(
    relinked: bool, tmp_path: Path
) -> None:
    """The disk was mounted elsewhere, and the link was changed, as the message about it says."""
    (tmp_path / "disk").mkdir()
    config = on_disk(tmp_path, str(tmp_path / "disk"))
    folder = RunFolder.of(config)
    assert on_ranks(train_rank, 1, config) == [ExitStatus.DONE]
    (tmp_path / "disk").rename(tmp_path / "disk2")
    before = [folder.exit_file.read_bytes(), folder.ledger_file.read_bytes()]
    if not relinked:
        with pytest.raises(UserError, match="which is not there"):
            read_and_check(Job(config=config, from_scratch=True))
        assert [folder.exit_file.read_bytes(), folder.ledger_file.read_bytes()] == before
        return
    folder.checkpoints.unlink()
    folder.checkpoints.symlink_to(tmp_path / "disk2" / "tiny")
    assert on_ranks(from_scratch, 1, config) == [ExitStatus.DONE]
    assert folder.checkpoints.resolve() == tmp_path / "disk2" / "tiny.1"
    assert steps_of(folder.checkpoints) == [3, 6]


def test_a_place_that_is_taken_is_refused_before_anything_is_prepared(tmp_path: Path) -> None:
    config = on_disk(tmp_path, str(tmp_path / "disk"))
    (tmp_path / "disk" / "tiny" / "step-00000003").mkdir(parents=True)
    with pytest.raises(UserError, match="may hold the checkpoints of a different run"):
        read_and_check(Job(config=config))
    assert not RunFolder.of(config).path.exists()


def test_a_relative_disk_can_be_moved_with_the_run_and_a_cut_off_link_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    config = on_disk(project, "disk", folder="runs")
    folder = RunFolder.of(config)
    folder.make()
    (project / "disk").mkdir()
    folder.checkpoints.mkdir()
    link_place(config, claim_place(config))
    folder.checkpoints.unlink()
    folder.checkpoints.symlink_to("elsewhere")
    for _ in range(2):  # killed after the link, before run.toml
        link_place(config, claim_place(config))
        folder.check_free()
    assert find_place(config) == Path("disk/tiny")
    assert os.readlink(folder.checkpoints) == "../../disk/tiny"
    shutil.move(project, tmp_path / "moved")
    check_place(RunFolder(tmp_path / "moved" / "runs" / "tiny"))


def test_it_cannot_change_when_a_run_resumes(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    assert on_ranks(train_rank, 1, tiny(tmp_path, run={"max_steps": 6})) == [ExitStatus.DONE]
    with pytest.raises(UserError, match="make checkpoints/ a link to it"):
        read_and_check(Job(config=on_disk(tmp_path, str(tmp_path / "disk"))))
