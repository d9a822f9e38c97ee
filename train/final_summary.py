"""The summary at the end of a run: a table, or one JSON document."""

import math
from shlex import quote

from minka.checkpoint.commit import step_name
from minka.eval.bits_per_byte import compressed_bits_per_byte
from minka.plan.cli import print_json
from minka.plan.errors import ExitStatus
from minka.plan.layout import counted
from minka.plan.scores import BITS_PER_BYTE, caveat
from minka.train.loop import TrainingEnd
from minka.train.recorder import Recorder
from minka.train.start_or_resume import saved_step

MAX_DOCUMENTS = 100_000  # more are not compressed


def summarise(record: Recorder, end: TrainingEnd, export: str | None, *, as_json: bool) -> None:
    """Print how the run ended, and its bits per byte next to those of compressors on the same documents."""
    folder, scores, last, (state, status, *_) = record.folder, record.scores, record.last, end
    saved = (folder.checkpoints / step_name(state.step)).is_dir()
    bits, compressors, but = None, {}, ""
    if scores is not None:
        bits, but = scores.scores[BITS_PER_BYTE], caveat(scores.unaccounted)
        if scores.documents <= MAX_DOCUMENTS and not but:  # else the tokens do not have the text to compress
            split, _ = record.held_out()  # None where it has been damaged since
            if split:
                compressors = compressed_bits_per_byte(split.text_of(i).encode() for i in range(scores.documents))
    if as_json:
        print_json(
            {
                "run": str(folder.path),
                "status": int(status),
                "reason": end.reason,
                "step": state.step,
                "tokens": state.tokens,
                "loss": last.loss if last else None,
                "refused_steps": record.refused_steps,
                "tokens_per_second": record.tokens_per_second,
                "bits_per_byte": bits,
                "unaccounted": scores.unaccounted.get(BITS_PER_BYTE, 0.0) if scores else None,
                "compressors_bits_per_byte": compressors,
                "saved": saved,
                "export": export,
            }
        )
        return
    ended = "trained" if status == ExitStatus.DONE else "stopped after"
    rows = [(ended, f"step {state.step:,} of {record.config.total_steps:,}, {state.tokens:,} tokens")]
    if last is not None:
        rows.append(("loss", f"{last.loss:.4f} nats a token"))
    if scores is not None and bits is not None:
        error = scores.stderr[BITS_PER_BYTE]
        error_text = f"standard error {error:.4f}" if math.isfinite(error) else "one document: no standard error"
        at = f", at step {record.evaluated_at:,}" if record.evaluated_at != state.step else ""
        held_out = f"{counted(scores.documents, 'document')}, {scores.bytes:,} bytes of validation{at}; {error_text}"
        rows.append(("bits per byte", f"{bits:.4f}  ({held_out})"))
        rows += [("", but)] if but else []
        rows += [(f"  {k}", f"{v:.4f}  (this model: {bits / v:.3f} of that)") for k, v in compressors.items()]
    if record.refused_steps:
        refused = f"{record.refused_steps:,}: not finite, no weight changed (see `skip` in the ledger)"
        rows.append(("refused steps", refused))
    rows.append(("run", str(folder.path)))
    if status == ExitStatus.NEEDS_PERSON:
        rows.append(("needs a person", end.reason))
    elif not saved:
        newest = saved_step(folder)
        left = "there is no checkpoint" if newest is None else f"the newest checkpoint is of step {newest:,}"
        rows.append(("NOT SAVED", f"step {state.step:,} could not be written; {left}"))
    if export is not None:
        rows.append(("for transformers", export))
    if status in (ExitStatus.FAILED, ExitStatus.STOPPED):
        rows.append(("to resume", f"minka train {quote(str(folder.path))}"))
    record.console.table(rows)
