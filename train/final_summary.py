"""The summary at the end of a run: a table, or one JSON document."""

import math
from pathlib import Path

from minka.checkpoint.commit import step_name
from minka.eval.bits_per_byte import compressed_bits_per_byte
from minka.model.hub_folder import MARKER
from minka.plan.cli import print_json
from minka.plan.errors import ExitStatus
from minka.plan.ledger import parse
from minka.plan.run_folder import RunFolder
from minka.train.recorder import Recorder
from minka.train.start_check import read_state
from minka.train.state import State

MOST_DOCUMENTS = 100_000


def summarise(record: Recorder, state: State, status: ExitStatus, *, as_json: bool) -> None:
    """Print how the run ended, and its bits per byte next to those of compressors on the same documents."""
    config, scores = record.config, record.scores
    compressors = _compressors(record) if scores is not None else {}
    bits = scores.scores["bits_per_byte"] if scores is not None else None
    saved, export = (record.folder.checkpoints / step_name(state.step)).is_dir(), _export(record.folder, state)
    if as_json:
        last = record.last
        print_json(
            {
                "run": str(record.folder.path),
                "status": int(status),
                "step": state.step,
                "tokens": state.tokens,
                "loss": last.loss if last else None,
                "refused_steps": record.refused_steps,
                "tokens_per_second": record.tokens_per_second,
                "bits_per_byte": bits,
                "compressors_bits_per_byte": compressors,
                "saved": saved,
                "export": export,
            }
        )
        return
    ended = "trained" if status == ExitStatus.DONE else "stopped after"
    lines = {ended: f"step {state.step:,} of {config.total_steps:,}, {state.tokens:,} tokens"}
    if record.last is not None:
        lines["loss"] = f"{record.last.loss:.4f} nats a token"
    if scores is not None and bits is not None:
        held = f"{scores.documents:,} documents, {scores.bytes:,} bytes of validation"
        error = scores.stderr["bits_per_byte"]
        error_text = f"standard error {error:.4f}" if math.isfinite(error) else "one document: no standard error"
        at = f", at step {record.evaluated_at:,}" if record.evaluated_at != state.step else ""
        lines["bits per byte"] = f"{bits:.4f}  ({held}{at}; {error_text})"
        for name, value in compressors.items():
            lines[f"  {name}"] = f"{value:.4f}  (this model: {bits / value:.3f} of that)"
    if record.refused_steps:
        lines["refused steps"] = f"{record.refused_steps:,}: not finite, no weight changed (see `skip` in the ledger)"
    lines["run"] = str(record.folder.path)
    if not saved:
        position = read_state(record.folder).position
        newest = f"the newest checkpoint is of step {position.step:,}" if position else "there is no checkpoint"
        lines["NOT SAVED"] = f"step {state.step:,} could not be written; {newest}"
    if export is not None:
        lines["for transformers"] = export
    if not saved or status == ExitStatus.STOPPED:
        lines["to resume"] = f"minka train {record.folder.path}"
    record.console.say(table(lines))


def table(lines: dict[str, str]) -> str:
    """Two columns between two rules, on a terminal and in a log."""
    width = max(map(len, lines))
    rows = [f"{name:<{width}}  {value}" for name, value in lines.items()]
    rule = "-" * max(map(len, rows))
    return "\n".join([rule, *rows, rule])


def _export(folder: RunFolder, state: State) -> str | None:
    """The folder of the run's export, if it was made from the checkpoint of `state`."""
    try:
        source = parse((folder.export / MARKER).read_bytes())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(folder.export) if Path(str(source)).name == step_name(state.step) else None


def _compressors(record: Recorder) -> dict[str, float]:
    split = record.store.split("validation")
    count = min(record.config.eval.max_documents or split.n_documents, split.n_documents)
    if count > MOST_DOCUMENTS:
        return {}
    return compressed_bits_per_byte(split.text_of(i).encode() for i in range(count))
