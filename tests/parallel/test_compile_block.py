"""Compiled blocks: few graphs, whatever a run asks of them, the numbers of eager ones, and no word from torch."""

import logging
import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from minka.benchmarks.training import synthetic_batch
from minka.data.batch import Batch
from minka.parallel.compile_block import MOST_GRAPHS
from minka.parallel.engine import Engine
from minka.parallel.mesh import start_mesh
from minka.plan.load_config import load_run
from minka.train.build_engine import build_engine

SMALL = ["model.layers=5", "model.d_model=32", "model.heads=4", "model.kv_heads=2", "model.head_dim=8", "model.d_ff=48"]
TOKENS = 32


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """How many graphs were made since the test began, by a backend that makes no kernels: it is quick."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


def batches(vocab: int) -> list[Batch]:
    """Those of a run: one document a row and several, in micro-batches of three sizes."""
    found = []
    for rows in (4, 2, 3):
        plain = synthetic_batch(vocab, rows, TOKENS)
        documents = (torch.arange(TOKENS) // 10).expand(rows, TOKENS).contiguous()
        found += [plain, replace(plain, documents=documents)]
    return found


def step(engine: Engine, batch: Batch) -> list[float]:
    sums = engine.forward_backward([engine.prepare(batch)], batch.target_count)
    found = [float(sums.loss), float(engine.grad_norm())]
    engine.apply(0.0, 1.0, torch.tensor(False))
    return found


@pytest.mark.parametrize(
    "recompute", ["selective", *(pytest.param(one, marks=pytest.mark.slow) for one in ("none", "block"))]
)
def test_a_run_needs_few_graphs_and_evaluation_none(
    recompute: str, graphs: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    found = {}
    for compiled in ("false", "true"):
        overrides = [*SMALL, f"kernels.compile={compiled}", f"layout.recompute={recompute}"]
        config = load_run("demo", overrides).config
        with start_mesh(config.layout) as mesh, caplog.at_level(logging.WARNING):
            engine, _ = build_engine(config, mesh)
            found[compiled] = [step(engine, batch) for batch in batches(config.model.vocab)]
            trained = graphs()
            for batch in batches(config.model.vocab):
                inputs = engine.prepare(batch)
                engine.token_losses(inputs)
                engine.attention_logits(inputs)
            assert graphs() == trained
    # With something to add or not, causal or masked, constant sizes or variable ones: not more with more layers.
    assert 0 < graphs() <= 8 < MOST_GRAPHS
    assert not counters["graph_break"]
    for ours, eager in zip(found["true"], found["false"], strict=True):
        assert ours == pytest.approx(eager, rel=1e-5)
    said = capfd.readouterr().err + caplog.text
    assert not re.search("recompile_limit|context_fn", said), said


def test_no_limit_of_torchs_is_reached_first() -> None:
    config = load_run("demo", [*SMALL, "kernels.compile=true"]).config
    with start_mesh(config.layout) as mesh:
        build_engine(config, mesh)
    assert torch._dynamo.config.recompile_limit >= MOST_GRAPHS
    assert torch._dynamo.config.accumulated_recompile_limit >= MOST_GRAPHS
