"""From a checkpoint on disk to a Hugging Face folder, one tensor at a time, in one process."""

from pathlib import Path

from minka.model.hub import write_folder
from minka.parallel.checkpoint import whole_tensors
from minka.plan.sections import ModelSection


def export_checkpoint(checkpoint: Path, folder: Path, model: ModelSection, tokenizer: Path, eod: int) -> None:
    """Write `folder` anew from `checkpoint`. Raises ValueError when a hash does not hold; then nothing changed."""
    write_folder(folder, model, whole_tensors(checkpoint, "model."), tokenizer=tokenizer, eod_token=eod)
