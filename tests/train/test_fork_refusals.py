"""What no run can start from is refused by name, before a rank is started or a file is made."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import environment
from families import crash, fork, rank_refuses, refused, stable_phase, trained
from minka.data.prepare import open_or_prepare
from minka.plan.load_config import load_run
from minka.plan.run_folder import RunFolder
from minka.train.command import main
from tiny import tiny

MIXED = "schedule.unit=tokens"  # the end is in steps


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The parent that is asked for."""
    return stable_phase(tmp_path_factory)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.layers=3",),
        ("model.d_model=64",),
        ("model.heads=2",),
        ("model.kv_heads=4",),
        ("model.head_dim=16",),
        ("model.d_ff=80",),
        ("model.vocab=300", "data.tokenizer=bpe", "data.store=other"),
        ("model.tied=true",),
        ("model.qkv_bias=true",),
        ("model.qk_norm=true",),
    ],
)
@pytest.mark.parametrize("parent", ["run", "hub"])
def test_a_forbidden_change_is_refused_by_name_before_anything_is_made(
    overrides: tuple[str, ...], parent: str, base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "base@10" if parent == "run" else str(base.export)
    text = refused(capsys, str(base.path), "run.name=no", f"run.start_from={source}", *overrides)
    assert f"with different settings: {overrides[0].split('=')[0]} = " in text
    assert not (base.path.parent / "no").exists()
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("run.start_from=base",), "a run cannot start from itself"),
        (("run.name=no", "run.start_from=nobody"), "'nobody' is neither a run nor a Hugging Face folder"),
        (("run.name=no", "run.start_from=base@7"), "no checkpoint of step 7. steps saved here: 5, 10, 15, 20"),
        (("run.name=no", "run.start_from=EXPORT", "run.start_with=all"), "a Hugging Face folder has weights only"),
        (("run.name=no", "run.start_with=all"), "needs run.start_from"),
        (
            ("run.name=no", "run.start_from=base@10", "run.start_with=all", "run.max_steps=10"),
            "run.max_steps=10 ends it there or earlier",
        ),
        (
            ("run.name=no", "run.start_from=base@10", "run.start_with=all", "run.max_tokens=1700"),
            "run.max_tokens=1700 ends it there or earlier",
        ),
        (
            (
                "run.name=no",
                "run.start_from=base@10",
                "run.start_with=all",
                "schedule.unit=tokens",
                "data.batch_tokens=64",
            ),
            "needs the batches that the run has had",
        ),
    ],
)
def test_what_no_run_can_start_from_is_refused(
    overrides: tuple[str, ...], message: str, base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [override.replace("EXPORT", str(base.export)) for override in overrides]
    assert message.lower() in refused(capsys, str(base.path), *given).lower()
    assert not (base.path.parent / "no").exists()


def test_a_tokenizer_that_is_not_the_parents_is_refused_and_a_copy_of_it_is_not(
    base: RunFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ours = base.path.parent.parent / "store" / "tokenizer"
    shutil.copytree(ours, tmp_path / "tokenizer")
    values = json.loads((ours / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(values))
    given = ["run.name=no", f"data.store={tmp_path / 'store'}", f"data.tokenizer={tmp_path / 'tokenizer'}"]
    for parent in ("base", str(base.export)):
        text = refused(capsys, str(base.path), *given, f"run.start_from={parent}")
        assert "its token ids mean different text" in text
        # No dot sticks to what is copied from it.
        assert f" data.store= data.tokenizer={base.export if parent != 'base' else ours} " in text
        assert not (tmp_path / "store").exists()
    # Nor when a store was prepared with it before.
    open_or_prepare(load_run(str(base.path), given).config, tmp_path)
    assert "its token ids mean different text" in refused(capsys, str(base.path), *given, "run.start_from=base")
    (base.export / "tokenizer.json").rename(tmp_path / "aside")
    try:
        text = refused(capsys, str(base.path), "run.name=no", f"run.start_from={base.export}")
        assert "cannot be read" in text
    finally:
        (tmp_path / "aside").rename(base.export / "tokenizer.json")


def test_a_tokenizer_that_is_still_to_be_trained_is_refused_before_the_corpus_is_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"model": {"vocab": 300}, "data": {"tokenizer": "bpe"}}
    config = tiny(tmp_path, run={"name": "bpe", "max_steps": 2}, schedule={"warmup": 0}, **sections)
    trained(config)
    given = [str(RunFolder.of(config).path), "run.name=no", "run.start_from=bpe", f"data.store={tmp_path / 'new'}"]
    assert f"data.tokenizer={tmp_path / 'store' / 'tokenizer'}" in refused(capsys, *given)
    assert not (tmp_path / "new").exists()


def test_a_pinned_parent_that_is_gone_or_another_is_refused(base: RunFolder, tmp_path: Path) -> None:
    parent = tmp_path / "runs" / "parent"
    shutil.copytree(base.path, parent)
    here = f"run.folder={tmp_path / 'runs'}"
    config = load_run(str(base.path), [here, "run.name=child", "run.start_from=parent@10", "run.max_steps=5"]).config
    crash(config, 3)
    lineage = RunFolder.of(config).lineage_file
    pinned = lineage.read_text()
    lineage.write_text(pinned.replace(RunFolder.of(config).lineage()[0]["sha256"], 64 * "0"))
    assert "has changed" in rank_refuses(config)
    lineage.write_text(pinned)
    shutil.rmtree(parent / "checkpoints" / "step-00000010")
    assert "is gone" in rank_refuses(config)


def test_a_hugging_face_folder_that_changed_under_a_run_is_refused(base: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(base.export, tmp_path / "hub")
    config = fork(base, "moved", str(tmp_path / "hub"), "run.max_steps=5")
    crash(config, 3)
    weights = tmp_path / "hub" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert "have changed" in rank_refuses(config)


def test_looking_at_a_parent_imports_no_torch(base: RunFolder) -> None:
    """The supervisor lives as long as the run; torch in it would cost seconds and a gigabyte."""
    script = (
        "import sys; from minka.train.command import main\n"
        f"assert main([{str(base.path)!r}, 'run.name=no', 'run.start_from=base', 'model.layers=3']) == 2\n"
        f"assert main([{str(base.path)!r}, 'run.seed=3']) == 2\n"
        f"assert main([{str(base.path)!r}]) == 0\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stdout


@pytest.mark.parametrize("hub", [True, False])
def test_a_template_does_not_ask_for_a_different_function_of_the_parents_weights(
    hub: bool, base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of the two commands that the message names starts the run."""
    template = base.path.parent / "template.toml"
    text = base.config_file.read_text()
    assert "rope_theta = 10000.0" in text
    template.write_text(text.replace("rope_theta = 10000.0", "rope_theta = 500000.0"))
    parent = str(base.export) if hub else "base"
    common = [str(template), "run.name=long", f"run.start_from={parent}", f"run.folder={base.path.parent}"]
    before = sorted(base.path.parent.rglob("*"))
    for dry in ([], ["--dry-run"]):
        said = refused(capsys, *common, *dry)
        assert "model.rope_theta = 500000.0 (was 10000.0)" in said
        assert "add the parent's (model.rope_theta=10000.0)" in said
    assert sorted(base.path.parent.rglob("*")) == before
    assert main([*common, "--dry-run", "model.rope_theta=500000.0"]) == 0
    assert "model.rope_theta = 500000.0 (was 10000.0): the same weights would" in capsys.readouterr().out
    assert main([*common, "--dry-run", "model.rope_theta=10000.0"]) == 0
    assert "# unlike" not in capsys.readouterr().out
