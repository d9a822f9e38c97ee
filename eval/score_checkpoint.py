"""A checkpoint on disk, scored by one process; the result lands where the run itself would have put it."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from minka.checkpoint.catalogue import find_checkpoint, run_and_step
from minka.checkpoint.reader_lease import leased
from minka.checkpoint.restore import restore_from
from minka.data.token_store import TokenStore
from minka.eval.bits_per_byte import heldout, write_scores
from minka.parallel.fsdp_engine import build_scorer
from minka.parallel.mesh import start_mesh
from minka.plan.atomic import writing
from minka.plan.config_sections import EvalSection
from minka.plan.errors import UserError
from minka.plan.layout import Layout
from minka.plan.load_config import load_run
from minka.plan.run_folder import find_run, store_of


def score_checkpoint(run: str, overrides: Sequence[str], alive: Callable[[], None]) -> Any:
    """Bits per byte of RUN or RUN@STEP, written to the run's evals/ and returned. Raises UserError."""
    _check_overrides(overrides)
    name, step = run_and_step(run)
    folder = find_run(name)
    config = load_run(str(folder.config_file), overrides).config
    own = config.eval.max_documents == folder.config().eval.max_documents
    checkpoint = find_checkpoint(folder.checkpoints, step)
    store = TokenStore.open(store_of(folder).folder)
    with writing(folder.evals):  # before the work, which may take hours
        folder.evals.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder.evals).close()
    layout = Layout(micro_batch=config.layout.micro_batch, precision=config.layout.precision)
    with start_mesh(layout) as mesh:
        scorer = build_scorer(config, mesh)
        with leased(folder.path, checkpoint):
            state = restore_from(checkpoint, scorer.weights(), mesh)
        scores = heldout(scorer, store.split("validation"), config, mesh, store.eod, alive)
    with writing(folder.evals):
        return write_scores(folder.evals, state["step"], state["tokens"], scores, checkpoint=checkpoint, own=own)


def _check_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        if not override.startswith("eval."):
            raise UserError(
                f"{override!r} is no setting of an evaluation",
                where="overrides",
                why="everything else belongs to the run, and its score would be another run's",
                remedy=f"allowed: {', '.join(f'eval.{name}' for name in EvalSection.model_fields)}",
            )
