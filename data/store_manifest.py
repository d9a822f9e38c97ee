"""manifest.json of a token store: what the store contains, with a hash of every file. Written last, it completes it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from minka.data.round_trip import TextLoss
from minka.data.tokenizer import TokenizerKind
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError
from minka.plan.read_file import read_json
from minka.plan.store_files import MANIFEST, REPAIR, damaged_store, sha256_of

SPLITS = ("train", "validation")
# Fields of DataSection that decide which tokens a store contains; the others decide how they are read.
DEFINING_FIELDS = frozenset(
    "source paths dataset dataset_config dataset_split text_field tokenizer validation_fraction max_bytes".split()
)
# The ones that later versions added: a default is left out, so that a store made before keeps its name.
ADDED_FIELDS = frozenset("id_field source_field url_field licence_field bad_rows split_on chunk_bytes".split())


class TokenizerInfo(BaseModel, frozen=True, extra="forbid"):
    """kind, the name in data.tokenizer, entries (largest id + 1), and sha256 of its tokenizer.json."""

    kind: TokenizerKind
    name: str
    entries: int = Field(ge=1)
    eod_token: str
    sha256: str


class SplitTotals(BaseModel, frozen=True, extra="forbid"):
    """Totals of one split; tokens include the end-of-document tokens, bytes are of UTF-8 text."""

    documents: int = Field(ge=1)
    tokens: int = Field(ge=2)
    bytes: int = Field(ge=1)


class FileInfo(BaseModel, frozen=True, extra="forbid"):
    bytes: int = Field(ge=0)
    sha256: str


class SkippedRows(BaseModel, frozen=True, extra="forbid"):
    """Rows left out by data.bad_rows="skip": how many, for each reason too, and the first as "file:line: reason"."""

    rows: int = 0
    reasons: dict[str, int] = {}
    first: tuple[str, ...] = ()

    def describe(self, documents: int) -> str:
        """One line; `documents` are the rows that were used."""
        share = 100 * self.rows / (self.rows + documents)
        counts = ", ".join(f"{reason}: {count:,}" for reason, count in self.reasons.items())
        many = "; most of the corpus is not used" if share > 50 else ""
        return f"{self.rows:,} of {self.rows + documents:,} rows ({share:.3g} %) were left out as bad ({counts}){many}"


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """The whole manifest. source: the DEFINING_FIELDS it was made from. cutoff: see HashedDocument.split_key."""

    format: Literal[1] = 1
    source: dict[str, Any]
    tokenizer: TokenizerInfo
    vocab: int = Field(ge=1, description="ids in the store are below it")
    eod: int = Field(ge=0)
    dtype: str
    cutoff: int
    moved: str = Field(description="why the cutoff is not validation_fraction's, or empty")
    empty: int = Field(ge=0, description="documents without text (or without tokens), left out")
    exact: bool = Field(description="decoding gives the text back, byte for byte, in every document that was tried")
    lossy: TextLoss | None = Field(None, description="what decoding did not give back; left out when exact")
    added: tuple[str, ...] | None = Field(None, description="tokens that the loaded tokenizer added to each text")
    splits: dict[Annotated[str, Field(pattern="^(train|validation)$")], SplitTotals] = Field(min_length=2)
    files: dict[str, FileInfo]
    skipped: SkippedRows | None = None
    left_out: dict[str, int] | None = Field(None, description="files of data.paths' folders not read, by suffix")

    @property
    def notes(self) -> list[str]:
        """What a person must know before training on this store, a line each."""
        lines = [self.moved] if self.moved else []
        if self.skipped:
            lines.append(self.skipped.describe(self.empty + sum(part.documents for part in self.splits.values())))
        if self.left_out:
            files = ", ".join(f"{count:,} {name}" for name, count in self.left_out.items())
            lines.append(f"files in the folders of data.paths that were not read: {files}")
        if self.lossy is not None:
            lines.append(self.lossy.describe(self.tokenizer.name))
        elif not self.exact:
            lines.append(f"tokenizer {self.tokenizer.name} changes text: scores in bits per byte are not comparable")
        if self.added:
            names = " and ".join(map(repr, dict.fromkeys(self.added)))
            lines.append(
                f"tokenizer {self.tokenizer.name} adds {names} to each text by itself: the documents are encoded "
                "without, and exports encode as the documents are"
            )
        return lines


def defining_fields(data: DataSection) -> dict[str, Any]:
    """The values of DEFINING_FIELDS, and those of ADDED_FIELDS that are not the default."""
    added = data.model_dump(mode="json", include=set(ADDED_FIELDS), exclude_defaults=True)
    return data.model_dump(mode="json", include=set(DEFINING_FIELDS)) | added


def hash_files(folder: Path) -> dict[str, FileInfo]:
    """Size and sha256 of every file below `folder` except the manifest, by posix path, sorted."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: hash_file(folder / name) for name in names if name != MANIFEST}


def hash_file(path: Path) -> FileInfo:
    """Size and sha256 of one file, read in blocks."""
    return FileInfo(bytes=path.stat().st_size, sha256=sha256_of(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into `folder`, which the caller publishes whole."""
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store. Raises UserError when the folder is not a store or its manifest is damaged."""
    if not (folder / MANIFEST).exists():
        what = "not a token store: manifest.json is missing" if folder.is_dir() else "there is no such store"
        raise UserError(what, where=str(folder), remedy="`minka data prepare RUN` makes one")
    values = read_json(folder / MANIFEST, why="the store is damaged", remedy=REPAIR)
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise damaged_store(folder, f"{MANIFEST}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
