"""Score a checkpoint on disk in one process. The result is written where the run itself would write it."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minka.checkpoint.catalogue import find_checkpoint, run_and_step
from minka.checkpoint.reader_lease import leased
from minka.checkpoint.restore import restore_from
from minka.data.token_store import TokenStore
from minka.data.verify import checked_split
from minka.eval.bits_per_byte import bits_per_byte
from minka.eval.continue_prompts import continue_prompts
from minka.eval.result_file import write_result
from minka.launch.environment import check_one_process, threads_per_rank, usable_cpus
from minka.parallel.fsdp_engine import build_scorer
from minka.parallel.mesh import start_mesh
from minka.plan.atomic import check_writable, writing
from minka.plan.config_sections import EvalSection
from minka.plan.errors import UserError
from minka.plan.layout import Layout
from minka.plan.load_config import load_run
from minka.plan.run_folder import find_run, store_of
from minka.plan.run_state import trained_model


def score_checkpoint(
    run: str, overrides: Sequence[str], heartbeat: Callable[[], None], output: Path | None = None
) -> Any:
    """Score RUN or RUN@STEP, write the result to the run's evals/, or to `output`, and return it. Raises UserError."""
    check_one_process(os.environ, "an evaluation")
    if output and not output.parent.is_dir():
        what = f"there is no folder {output.parent}"
        raise UserError(what, where=f"--output {output}", remedy="make it, or name a file elsewhere")
    if output and output.suffix != ".json":
        what = "the result is a JSON document, and this is not the name of a .json file"
        raise UserError(what, where=f"--output {output}", remedy="for example --output scores.json")
    for override in overrides:
        if not override.startswith("eval."):
            raise UserError(
                f"{override!r} is not a setting of the evaluation; all others are those of the run",
                where="overrides",
                remedy=f"allowed: {', '.join(f'eval.{name}' for name in EvalSection.model_fields)}",
            )
    name, wanted = run_and_step(run)
    folder = find_run(name)
    config = load_run(str(folder.config_file), overrides).config
    own_settings = config.eval.max_documents == folder.config().eval.max_documents
    trained_model(folder)  # or the scores are of a different function
    checkpoint = find_checkpoint(folder.checkpoints, wanted)
    store = TokenStore.open(store_of(folder).folder)
    folder.check_data(store.folder, store.hash)
    split = checked_split(store, "validation")
    place = output.parent if output else folder.evals
    remedy = "name a file elsewhere: --output FILE.json"
    with writing(place, remedy):  # fail before the work, which may take hours
        if not output:
            place.mkdir(exist_ok=True)
        check_writable(place)
    layout = Layout(micro_batch=config.layout.micro_batch, precision=config.layout.precision)
    torch.set_num_threads(threads_per_rank(os.environ, 1, usable_cpus()))
    with start_mesh(layout) as mesh:
        scorer = build_scorer(config, mesh)
        with leased(folder.path, checkpoint):
            state = restore_from(checkpoint, scorer.weights(), mesh)
        scores = bits_per_byte(scorer, split, config, mesh, store.eod, heartbeat)
        step, tokens = state["step"], state["tokens"]
        written = continue_prompts(scorer, store.tokenizer.backend, config, step, mesh, store.eod)
    with writing(place, remedy):
        return write_result(
            folder.evals,
            step,
            tokens,
            scores,
            written or None,
            checkpoint=checkpoint,
            own_settings=own_settings,
            output=output,
        )
