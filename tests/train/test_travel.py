"""A checkpoint saved under one layout resumes under any other, bit for bit and with the same samples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.restore import restore, whole_tensors
from minka.data.batch import PADDING
from minka.data.loader import Loader
from minka.data.token_store import TokenStore
from minka.parallel.mesh import start_mesh
from minka.plan.config import RunConfig
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from minka.train.accept_step import accepts
from minka.train.build_engine import build_engine
from minka.train.schedule import learning_rate
from minka.train.state import State
from parity import boxes_of, put_together
from ranks import on_ranks
from tiny import tiny, train_rank

SAVED_AT = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "shard 3": {"shard": 3},
    "replicate 2 x shard 2": {"replicate": 2, "shard": 2},
    "tensor 2": {"tensor": 2},
    "context 2 x tensor 2": {"context": 2, "tensor": 2},
    "shard 2 x context 2": {"shard": 2, "context": 2},
    "pipeline 2 x dualpipev": {"pipeline": 2, "schedule": "dualpipev"},
    "pipeline 2 x shard 2 x interleaved": {"pipeline": 2, "shard": 2, "schedule": "interleaved"},
}


def run_under(layout: str, folder: Path, **run: Any) -> RunConfig:
    return tiny(
        folder,
        run={"name": "".join(c if c.isalnum() else "-" for c in layout), "max_steps": SAVED_AT + 1, **run},
        model={"layers": 4, "qk_norm": True},
        data={"batch_tokens": 8 * 32, "batch_warmup": []},
        schedule={"kind": "constant", "warmup": 2},
        layout={"shard": 1, "micro_batch": 1, **LAYOUTS[layout]},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One corpus and store for all tests."""
    return tmp_path_factory.mktemp("travel")


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> dict[str, Any]:
    """The last step event of one process that was never stopped."""
    config = run_under("one process", folder, name="unbroken")
    assert on_ranks(train_rank, 1, config) == [0]
    events = read_ledger(RunFolder.of(config).ledger_file)
    return [event for event in events if event["event"] == "step"][-1]


@pytest.mark.parametrize(
    "saved", [pytest.param(n, marks=[] if "dualpipev" in n else pytest.mark.slow) for n in LAYOUTS]
)
def test_a_checkpoint_resumes_under_every_other_layout(saved: str, folder: Path, unbroken: dict[str, Any]) -> None:
    config = run_under(saved, folder, max_steps=SAVED_AT)
    assert set(on_ranks(train_rank, config.layout.world, config)) == {0}
    run = RunFolder.of(config)
    (checkpoint,) = checkpoints(run.checkpoints)
    stored = {name: tensor.double().numpy() for name, tensor in whole_tensors(checkpoint, "")}
    samples: dict[str, list[int]] = {}
    for name in LAYOUTS:
        other = run_under(name, folder)
        found = on_ranks(resumed, other.layout.world, other, str(run.checkpoints))
        whole = put_together([rank["pieces"] for rank in found])
        assert whole.keys() == stored.keys() - {"rng.torch"}
        for tensor, values in whole.items():
            assert np.array_equal(values, stored[tensor]), f"{tensor} from {saved} under {name}"
        error = abs(found[0]["loss"] / unbroken["loss"] - 1)
        print(f"{saved} -> {name}: next loss {error:.1e}")
        assert error <= 2e-6
        samples[name] = sorted(sample for rank in found for sample in rank["samples"])
    assert len(set(map(tuple, samples.values()))) == 1
    assert samples["one process"] == list(range(8 * SAVED_AT, 8 * SAVED_AT + 8))


def resumed(config: RunConfig, folder: str) -> dict[str, Any]:
    """Restore on one rank and take a step. Return the restored pieces, the loss and the samples."""
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        state = State.from_json(restore(Path(folder), engine.tensors(), mesh, lambda path, reason: None))
        pieces = boxes_of(engine.tensors())
        split = TokenStore.open(Path(config.data.store)).split("train")
        with Loader(config, split, mesh.data_rank, mesh.layout.data_ways, state.loader, engine.prepare) as loader:
            batch, micro_batches, _ = next(loader)
        (count,) = mesh.sum_on_host([batch.target_count if mesh.leads_data else 0])
        sums = engine.forward_backward(micro_batches, count)
        rate = learning_rate(config, state.step, state.tokens)
        engine.apply(rate, config.optimizer.max_norm, accepts(sums, engine.grad_norm()))
        samples = [s for s in batch.samples.tolist() if s != PADDING] if mesh.leads_data else []
        return {"pieces": pieces, "loss": float(sums.loss) / count, "samples": samples}
