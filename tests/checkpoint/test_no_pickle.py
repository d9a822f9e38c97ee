"""No path of a checkpoint makes an object from bytes: all that could is made to fail, and everything works."""

import _pickle
import pickle  # noqa: TID251 - to make it fail
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from minka.checkpoint.async_saver import AsyncSaver
from minka.checkpoint.export import export_checkpoint
from minka.checkpoint.restore import restore
from minka.checkpoint.write import SaveRequest
from minka.eval.score_checkpoint import score_checkpoint
from minka.parallel.mesh import Mesh, start_mesh
from minka.parallel.pieces import Piece, piece_of
from minka.plan.config import RunConfig
from minka.plan.layout import Layout
from minka.plan.ledger import read_ledger
from minka.plan.load_config import load_run
from minka.plan.run_folder import RunFolder, store_of
from minka.train.replay import replay
from ranks import on_ranks
from saved import saved_run
from tiny import tiny, train_rank

OBJECTS = "all_gather_object gather_object broadcast_object_list scatter_object_list send_object_list recv_object_list"


def forbid_pickle() -> None:
    """From here on this process raises wherever an object might be made from bytes."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("pickle was called")

    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
            setattr(module, name, refuse)
    for name in ("load", "save"):
        setattr(torch, name, refuse)
    for name in OBJECTS.split():
        setattr(dist, name, refuse)
    for name in (*OBJECTS.split(), "_pickler", "_unpickler"):
        assert hasattr(dist.distributed_c10d, name)
        setattr(dist.distributed_c10d, name, refuse)


def rows(rank: int, ranks: int, value: float) -> dict[str, Piece]:
    each = 4 // ranks
    return {
        "model.w": Piece(torch.full((each, 3), value), (each * rank, 0), (4, 3)),
        "count": piece_of(torch.tensor(value)),
    }


def save_without_pickle(folder: str) -> str:
    with start_mesh(Layout()) as mesh:
        forbid_pickle()
        saver = AsyncSaver(Path(folder), mesh, 2)
        for step in (1, 2, 3):
            saver.save(SaveRequest(step, {"step": step}), rows(mesh.rank, mesh.ranks, float(step)))
            saver.wait_for_copy()
            outcome = saver.wait()
            assert outcome is not None
            assert not outcome.error, outcome.error
        return restored_without_pickle(folder, mesh)


def restore_without_pickle(folder: str) -> str:
    with start_mesh(Layout()) as mesh:
        forbid_pickle()
        return restored_without_pickle(folder, mesh)


def restored_without_pickle(folder: str, mesh: Mesh) -> str:
    read = rows(mesh.rank, mesh.ranks, -1.0)
    state = restore(Path(folder), read, mesh, lambda path, reason: None)
    assert bool((read["model.w"].local == state["step"]).all())
    check_forbidden()
    return f"step {state['step']}"


def check_forbidden() -> None:
    """Nobody has made it possible again meanwhile."""
    for call in (lambda: pickle.loads(b""), lambda: torch.load("x")):  # noqa: S301
        with pytest.raises(AssertionError, match="pickle was called"):
            call()


def export_without_pickle(run: str, folder: str) -> str:
    forbid_pickle()
    found = RunFolder(Path(run))
    store = store_of(found)
    checkpoint = found.checkpoints / "step-00000001"
    export_checkpoint(checkpoint, Path(folder), found.config().model, store.tokenizer, store.eod)
    return "exported"


def test_no_path_calls_pickle(tmp_path: Path) -> None:
    """Saved by two ranks beside the training, restored by two and by one, and exported."""
    folder = str(tmp_path / "checkpoints")
    assert on_ranks(save_without_pickle, 2, folder) == ["step 3"] * 2
    assert on_ranks(restore_without_pickle, 1, folder) == ["step 3"]
    assert on_ranks(restore_without_pickle, 4, folder) == ["step 3"] * 4
    run = saved_run(tmp_path / "run", 1)
    assert on_ranks(export_without_pickle, 1, str(run.path), str(tmp_path / "out")) == ["exported"]


def train_without_pickle(config: RunConfig) -> int:
    forbid_pickle()
    status = train_rank(config)
    check_forbidden()
    return status


def score_without_pickle(run: str) -> int:
    forbid_pickle()
    return int(score_checkpoint(run, ["eval.max_documents=2"], lambda: None)["step"])


def replay_without_pickle(run: Path, step: int) -> str:
    forbid_pickle()
    result = replay(RunFolder(run), step)
    check_forbidden()
    return f"{result['verdict']} from {Path(result['from']).name}"


@pytest.mark.slow
def test_no_path_of_a_run_calls_pickle(tmp_path: Path) -> None:
    """Trained, gone on with, forked from checkpoints and from the export, scored and replayed, by one rank or two."""
    saves = {"every_steps": 2, "keep": 9, "export": True}
    config = tiny(tmp_path, run={"name": "base", "max_steps": 4}, schedule={"warmup": 2}, checkpoint=saves)
    base = RunFolder.of(config)
    assert on_ranks(train_without_pickle, 2, config) == [0, 0]
    longer = load_run(str(base.path), ["run.max_steps=6"]).config
    assert on_ranks(train_without_pickle, 1, longer) == [0]
    assert on_ranks(train_without_pickle, 2, load_run(str(base.path), ["run.max_steps=8"]).config) == [0, 0]
    assert [e["step"] for e in read_ledger(base.ledger_file) if e["event"] == "restore"] == [4, 6]
    for name, parent, start_with in (
        ("child", "base@4", "all"),
        ("light", "base", "weights"),
        ("hub", None, "weights"),
    ):
        origin = [f"run.start_from={parent or base.export}", f"run.start_with={start_with}"]
        fork = load_run(str(base.path), [f"run.name={name}", *origin]).config
        assert on_ranks(train_without_pickle, 2, fork) == [0, 0]
        assert RunFolder.of(fork).lineage()[0]["with"] == start_with
    assert on_ranks(score_without_pickle, 1, f"{base.path}@6") == [6]
    assert on_ranks(replay_without_pickle, 1, base.path, 6) == ["bit for bit from step-00000004"]
    child = RunFolder.of(config).path.parent / "child"
    assert on_ranks(replay_without_pickle, 1, child, 5)[0].endswith("from its parent, base at step 4")
