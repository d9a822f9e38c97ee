"""Write a checkpoint as a Hugging Face folder, in one process, one tensor at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from minka.checkpoint.filesystem import Heartbeat
from minka.checkpoint.manifest import read_header
from minka.checkpoint.restore import DAMAGE, whole_tensors
from minka.model.hub_folder import write_folder
from minka.plan.config_sections import ModelSection
from minka.plan.errors import UserError
from minka.plan.store_files import check_store_files


def export_checkpoint(
    checkpoint: Path, folder: Path, model: ModelSection, tokenizer: Path, eod: int, alive: Heartbeat = lambda: None
) -> None:
    """Write `folder` from `checkpoint` and the store's `tokenizer`, replacing an earlier export.

    Raises UserError when a hash of either does not match, and where write_folder does; then nothing has changed.
    """
    check_store_files(tokenizer.parent, f"{tokenizer.name}/")
    with _intact(checkpoint):
        sha256 = read_header(checkpoint).sha256
    weights, source = _readable(checkpoint, alive), str(checkpoint)
    write_folder(folder, model, weights, tokenizer=tokenizer, eod_token=eod, source=source, sha256=sha256)


def _readable(checkpoint: Path, alive: Heartbeat) -> Iterator[tuple[str, Tensor]]:
    with _intact(checkpoint):
        yield from whole_tensors(checkpoint, "model.", alive=alive)


@contextmanager
def _intact(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        remedy = "take a different checkpoint (RUN@STEP)"
        raise UserError(f"damaged: {error}", where=str(checkpoint), remedy=remedy) from None
