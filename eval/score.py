"""A checkpoint on disk, scored by one process; the result lands where the run itself would have put it."""

from collections.abc import Callable, Sequence
from typing import Any

from minka.data.store import TokenStore
from minka.eval.bits import heldout, write_scores
from minka.parallel.apply import build_model
from minka.parallel.checkpoint import find_checkpoint, load_manifest, restore_from
from minka.parallel.engine import ShardedScorer
from minka.parallel.mesh import start_mesh
from minka.parallel.pieces import piece_of
from minka.plan.layout import Layout
from minka.plan.load import load_run
from minka.plan.run import find_run, store_of


def score_checkpoint(run: str, overrides: Sequence[str], alive: Callable[[], None]) -> Any:
    """Bits per byte of RUN or RUN@STEP, written to the run's evals/ and returned. Raises UserError."""
    name, _, step = run.partition("@")
    folder = find_run(name)
    config = load_run(str(folder.config_file), overrides).config
    checkpoint = find_checkpoint(folder.checkpoints, step)
    store = TokenStore.open(store_of(folder).folder)
    layout = Layout(micro_batch=config.layout.micro_batch, precision=config.layout.precision)
    with start_mesh(layout) as mesh:
        model = build_model(config, mesh)
        restore_from(checkpoint, {f"model.{n}": piece_of(p) for n, p in model.named_parameters()})
        scorer = ShardedScorer(model, mesh)
        scores = heldout(scorer, store.split("validation"), config, mesh, store.eod, alive)
        state = load_manifest(checkpoint)["state"]
        return write_scores(folder.evals, state["step"], state["tokens"], scores)
