"""manifest.json: the header of a checkpoint and the run's state, sealed by a hash over its own bytes.

    {"format": 3,
     "number": 7,                                grows with every save of the run
     "time": ..., "step": 500,
     "state": {...},                             the run's state (train/state.py)
     "permanent": false,                         kept forever
     "chunk_bytes": 4194304,                     what one hash of a shard file covers
     "index": {"bytes": ..., "sha256": "..."},   of index.json (index.py)
     "sha256": "..."}                            of all bytes before this entry

Formats 1 and 2, which are still read, had the tables of all ranks in this file (stored_checkpoint.py).
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from minka.checkpoint.filesystem import LOCAL, FileSystem
from minka.plan.ledger import finite

FORMAT = 3
NAME = "manifest.json"
CHUNK_BYTES = 4 * 2**20  # hashed while still in the cache: 11 to 13 % of a save where 16 MiB were 7 to 15 (LOG.md)
MAX_CHUNK_BYTES = 64 * 2**20
MAX_BYTES = 2**30  # of a file of JSON: index.json has 4 MB at 16,384 ranks; a format-2 manifest had 300 MB
STEP_FOLDER = re.compile(r"step-([0-9]{8,})")
OLD_DEFAULTS = {"number": 0, "time": 0.0, "permanent": False, "chunk_bytes": 16 * 2**20}

Count = Annotated[int, Field(ge=0, lt=2**60)]  # bytes of so many numbers still fit in 64 bits
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Model = TypeVar("Model", bound=BaseModel)
Bytes = bytes | bytearray


class Damage(ValueError):
    """A file of a checkpoint differs from what was written. The message names the file."""


class StrictModel(BaseModel, strict=True, frozen=True, extra="forbid"):
    """A part of a file: no conversions, no unknown keys."""


class Sealed(StrictModel):
    """Size and hash of a file."""

    bytes: Count
    sha256: Sha256

    @classmethod
    def of(cls, content: Bytes) -> "Sealed":
        return cls(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


class Header(StrictModel):
    """What a manifest says. `sha256` identifies the checkpoint: it covers every file, by their hashes."""

    format: Annotated[int, Field(ge=1, le=FORMAT)]
    number: Annotated[int, Field(ge=0, lt=2**63)]
    time: float
    step: Annotated[int, Field(ge=0, lt=2**63)]
    permanent: bool
    state: dict[str, Any]
    chunk_bytes: Annotated[int, Field(gt=0, le=MAX_CHUNK_BYTES)]
    sha256: Sha256
    index: Sealed | None = None
    old_tables: dict[str, Any] | None = None  # formats 1 and 2, without an index: `files` and `tensors`, not checked


def seal(values: Mapping[str, Any]) -> bytes:
    """The content of a manifest with these values: adds the format and the hash, one line a key."""
    plain = finite({"format": FORMAT, **values})
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in plain.items())
    body = f"{{\n{lines}".encode()
    return body + _last_line(body)


def read_header(path: Path, fs: FileSystem = LOCAL) -> Header:
    """The header of the checkpoint `path`, of any format.

    Raises OSError when it cannot be read, and Damage when it is not as it was written or of an unknown format.
    """
    file = path / NAME
    if path.is_symlink():
        raise Damage(f"{path} is a symbolic link; a checkpoint is a folder")
    size = fs.size(file)
    if size > MAX_BYTES:
        raise Damage(f"{file} has {size:,} bytes; a manifest has at most {MAX_BYTES:,}")
    raw = fs.read(file, 0, size)
    if raw.startswith(f'{{\n"format": {FORMAT},\n'.encode()):
        end = len(raw) - len(_last_line(b""))
        if raw[end:] != _last_line(raw[:end]):
            raise Damage(f"{file} does not match its own hash")
        header = parse_model(Header, raw, file)
    else:
        header = parse_model(Header, OLD_DEFAULTS | _read_old(raw, file), file)
    if (header.index is None) == (header.old_tables is None):
        raise Damage(f"{file} has no index")
    named = STEP_FOLDER.fullmatch(path.name)
    if named and int(named[1]) != header.step:
        raise Damage(f"{file} is of step {header.step}; its folder is of a different step")
    return header


def read_sealed(file: Path, seal: Sealed, fs: FileSystem) -> bytearray:
    """The content of a file, checked against its size and hash. Raises OSError and Damage."""
    size = fs.size(file)
    if size != seal.bytes or size > MAX_BYTES:
        raise Damage(f"{file} has {size:,} bytes instead of {seal.bytes:,}")
    raw = fs.read(file, 0, size)
    if hashlib.sha256(raw).hexdigest() != seal.sha256:
        raise Damage(f"{file} does not match its hash")
    return raw


def parse_model(model: type[Model], content: Bytes | Mapping[str, Any], file: Path) -> Model:
    """JSON, or values read from it, as a model. Raises Damage that names `file` and the first wrong entry."""
    try:
        return model.model_validate(content) if isinstance(content, Mapping) else model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Damage(f"{file}: {where[:100]}: {first['msg'][:200]}") from None


def _read_old(raw: bytearray, file: Path) -> dict[str, Any]:
    """The values of a manifest of format 1 or 2 whose hash matches, its tables under `old_tables`. Raises Damage."""
    try:
        values = json.loads(raw)
        number = values.get("format") if isinstance(values, dict) else None
        if number not in (1, 2, FORMAT):
            raise ValueError(f"format {str(number)[:40]} is unknown; this version reads 1 to {FORMAT}")
        unsealed = {key: value for key, value in values.items() if key != "sha256"}
        canonical = json.dumps(unsealed, sort_keys=True, separators=(",", ":"), allow_nan=False)
        if values.get("sha256") != hashlib.sha256(canonical.encode()).hexdigest():
            raise ValueError("it does not match its own hash")
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
        written = json.dumps(values, indent=2) + "\n" if number == 1 else f"{{\n{lines}\n}}\n"
        if raw != written.encode():
            raise ValueError("it has the values that were written, in a different text")
        tables = {key: values.pop(key) for key in ("files", "tensors")}
    except (ValueError, KeyError, RecursionError) as error:
        raise Damage(f"{file}: {str(error)[:200]}") from None
    return {**values, "old_tables": tables}


def _last_line(body: Bytes) -> bytes:
    return f',\n"sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
