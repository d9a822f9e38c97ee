"""`minka export` as a user types it: what it writes, what it replaces, and what it refuses in one paragraph."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from minka.checkpoint.command import main
from minka.checkpoint.restore import whole_tensors
from minka.data.prepare import open_or_prepare
from minka.plan.errors import ExitStatus
from minka.plan.run_folder import EXPORT_MARKER, RunFolder
from models import from_folder
from saved import saved_run
from tiny import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with checkpoints of steps 1 and 2; only read here."""
    return saved_run(tmp_path_factory.mktemp("export"), 1, 2)


@pytest.mark.parametrize("name", ["", "@2", "/run.toml", "/run.toml@2"])
def test_a_checkpoint_becomes_a_folder_and_again(name: str, run: RunFolder, tmp_path: Path) -> None:
    assert main([f"{run.path}@1", str(tmp_path / "out")]) == 0
    assert main([f"{run.path}{name}", str(tmp_path / "out")]) == 0
    checkpoint = run.checkpoints / "step-00000002"
    assert json.loads((tmp_path / "out" / EXPORT_MARKER).read_text())["source"] == str(checkpoint)
    exported = from_folder(tmp_path / "out").state_dict()
    for tensor, weight in whole_tensors(checkpoint, "model."):
        assert torch.equal(exported[tensor], weight), tensor


def test_transformers_loads_it_with_its_tokenizer(run: RunFolder, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main([str(run.path), str(tmp_path / "out")]) == 0
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("one number", return_tensors="pt").input_ids
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits.isfinite().all()


@pytest.mark.parametrize("place", [".", "/proc/out", "/dev/null", "something"])
def test_a_place_that_is_not_free_is_one_paragraph(
    place: str, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").mkdir()
    (tmp_path / "something" / "of_mine").touch()
    assert main([str(run.path), place]) == ExitStatus.REFUSED
    errors = capsys.readouterr().err
    assert errors.startswith("minka: ")
    assert errors.count("\n") == 1
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "something",
        "something/of_mine",
    ]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_named_and_nothing_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved_run(tmp_path, 1)
    file = tmp_path / "store" / "tokenizer" / name
    whole = file.read_bytes()
    for damaged in (whole[:-1], b"{}", None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert main([str(run.path), str(tmp_path / "out")]) == ExitStatus.REFUSED
        assert f"tokenizer/{name} " in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    file.write_bytes(whole)
    assert main([str(run.path), str(tmp_path / "out")]) == 0


def test_the_tokenizer_of_a_different_store_in_its_place_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved_run(tmp_path, 1)
    shutil.rmtree(tmp_path / "store")
    open_or_prepare(tiny(tmp_path, data={"validation_fraction": 0.3}), tmp_path)
    assert main([str(run.path), str(tmp_path / "out")]) == ExitStatus.REFUSED
    assert "not the token store that the run began with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["manifest.json", "rank-00000.safetensors"])
def test_a_damaged_checkpoint_changes_nothing(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = saved_run(tmp_path, 1, 2)
    assert main([f"{run.path}@1", str(tmp_path / "out")]) == 0
    file = run.checkpoints / "step-00000002" / damage
    file.write_bytes(file.read_bytes()[:-9])
    assert main([f"{run.path}@2", str(tmp_path / "out")]) == ExitStatus.REFUSED
    assert "damaged" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / EXPORT_MARKER).read_text())["source"].endswith("step-00000001")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}])
def test_what_a_reader_of_the_folder_drops_is_printed(
    fields: dict[str, bool], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved_run(tmp_path, 1, model={"rope_scaling": {"factor": 4.0}, **fields})
    said = "the export is a qwen3 with rope_scaling: llama.cpp's converter drops the scaling" if fields else ""
    assert main([str(run.path), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["limits"].startswith(said)
    assert main([str(run.path), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("\n") == 1 + bool(fields)
