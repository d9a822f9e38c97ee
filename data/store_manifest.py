"""manifest.json: what a token store holds, with a hash of every file; written last: with it, the store exists."""

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from minka.data.tokenizer import Kind
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
# Fields of DataSection that decide which tokens a store holds; the rest decides how they are read.
DEFINING = (
    "source",
    "paths",
    "dataset",
    "dataset_config",
    "dataset_split",
    "text_field",
    "tokenizer",
    "validation_fraction",
    "max_bytes",
)
BLOCK = 1 << 20


class StrictModel(BaseModel, frozen=True, extra="forbid"):
    """Base of the manifest's parts."""


class TokenizerPart(StrictModel):
    """kind, the name it was asked for by, entries (largest id + 1), and sha256 of its tokenizer.json."""

    kind: Kind
    name: str
    entries: int = Field(ge=1)
    eod_token: str
    sha256: str


class SplitPart(StrictModel):
    """Totals of one split; tokens count the end-of-document tokens, bytes are of UTF-8 text."""

    documents: int = Field(ge=1)
    tokens: int = Field(ge=2)
    bytes: int = Field(ge=1)


class FilePart(StrictModel):
    """Size and hash of one file."""

    bytes: int = Field(ge=0)
    sha256: str


class Manifest(StrictModel):
    """The store in one value. source: the DEFINING fields it was made from. cutoff: see corpus.Item.key."""

    format: Literal[1] = 1
    source: dict[str, Any]
    tokenizer: TokenizerPart
    vocab: int = Field(ge=1, description="ids in the store are below it")
    eod: int = Field(ge=0)
    dtype: str
    cutoff: int
    moved: str = Field(description="why the cutoff is not validation_fraction's, or empty")
    empty: int = Field(ge=0, description="documents without text (or without tokens), left out")
    exact: bool = Field(description="decoding gives back the text, byte for byte, as far as it was tried")
    splits: dict[str, SplitPart]
    files: dict[str, FilePart]


def describe(data: DataSection) -> dict[str, Any]:
    """The fields of a DataSection that decide which tokens a store holds."""
    return data.model_dump(mode="json", include=set(DEFINING))


def hash_files(folder: Path) -> dict[str, FilePart]:
    """Size and sha256 of every file below `folder` but the manifest, by posix path, sorted."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: hash_file(folder / name) for name in names if name != MANIFEST}


def hash_file(path: Path) -> FilePart:
    """Size and sha256 of one file, read in blocks."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FilePart(bytes=path.stat().st_size, sha256=digest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it as JSON."""
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store. Raises UserError when the folder is no store or its manifest is damaged."""
    file = folder / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        what = "this folder is no token store: it has no manifest.json" if folder.is_dir() else "there is no such store"
        raise UserError(what, where=str(folder), remedy="`minka data prepare RUN` makes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the manifest cannot be read: {error}", where=str(file), remedy=_again(folder)) from None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise UserError(
            f"the manifest is damaged: {f'{place}: ' if place else ''}{problem['msg']}",
            where=str(file),
            remedy=_again(folder),
        ) from None


def _again(folder: Path) -> str:
    return f"remove {folder} and prepare it again with `minka data prepare RUN`"
