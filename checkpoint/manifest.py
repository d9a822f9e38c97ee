"""What a checkpoint says of itself: its manifest, sealed by a hash of its own. Nothing in it is believed unchecked.

    {"format": 2, "number": 7, "time": ..., "step": 500, "permanent": false,   number: grows with every save
     "state": {...},                                                          the run's own words (train/state.py)
     "chunk_bytes": 4194304,
     "files": {"rank-00000.safetensors": {"bytes": ..., "sha256": [one a chunk of the file]}, ...},
     "tensors": {name: {"shape": [...], "dtype": "float32", "pieces": [{"file": ..., "offset": [...], "size": [...]}]}},
                                                    and where a file has several pieces of a tensor, "key": "NAME#1"
     "sha256": of all the rest}

Format 1 had neither number, time, permanent nor chunk_bytes, and less in its state; it is read as if it had.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from minka.checkpoint.filesystem import LOCAL, Disk
from minka.plan.ledger import finite

FORMAT = 2
NAME = "manifest.json"
CHUNK_BYTES = 4 * 2**20  # hashed while still in the cache: 11 to 13 % of a save where 16 MiB were 7 to 15 (LOG.md)
MOST_CHUNK_BYTES = 64 * 2**20
MOST_BYTES = 2**30  # of a manifest: a 405B model on 16,384 ranks has about a third of that
CHECKPOINT = re.compile(r"step-[0-9]{8,}")
MOST_NUMBERS = 2**60  # in a tensor: their bytes, and an offset into them, still fit in 64 bits
SHARD = re.compile(r"rank-[0-9]{5,}\.safetensors")
DTYPES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
KEYS = ("step", "state", "files", "tensors", "sha256")
OLD_DEFAULTS = {"number": 0, "time": 0.0, "permanent": False, "chunk_bytes": 16 * 2**20}


class Damage(ValueError):
    """A checkpoint is not what was written: which file, and what is wrong with it."""


def seal(body: Mapping[str, Any]) -> bytes:
    """The manifest file of `body`, which gets format and hash: what `load_manifest` will check."""
    plain = {"format": FORMAT, **{key: _plain(value) for key, value in body.items()}}
    return _text({**plain, "sha256": _digest(plain)})


def load_manifest(path: Path, disk: Disk = LOCAL) -> dict[str, Any]:
    """The manifest of the checkpoint `path`, format 2's keys in it whatever its format.

    Raises OSError when it cannot be read, and Damage when it is not what was written or of a format that is not known.
    """
    file = path / NAME
    if path.is_symlink():
        raise Damage(f"{path} is a symbolic link, and a checkpoint is a folder")
    size = disk.size(file)
    if size > MOST_BYTES:
        raise Damage(f"{file} has {size:,} bytes; no manifest is that long")
    raw = bytes(disk.read(file, 0, size))
    try:
        manifest = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Damage(f"{file} is no JSON: {error}") from None
    if not isinstance(manifest, dict):
        raise Damage(f"{file} holds no JSON object")
    whole = {**OLD_DEFAULTS, **manifest}
    try:
        _check_seal(file, manifest, raw)
        _check(file, whole)
    except RecursionError:  # what writes JSON gives up sooner than what reads it
        raise Damage(f"{file} is nested too deep") from None
    if CHECKPOINT.fullmatch(path.name) and int(path.name.removeprefix("step-")) != whole["step"]:
        raise Damage(f"{file} is of step {whole['step']}, and its folder of another")
    return whole


def nbytes(shape: list[int], dtype: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPES[dtype]


def _check_seal(file: Path, manifest: Mapping[str, Any], raw: bytes) -> None:
    """Its format is known, nothing is missing, and no byte is another than `seal` wrote."""
    if manifest.get("format") not in (1, FORMAT):
        raise Damage(f"{file} has format {str(manifest.get('format'))[:40]}; known here: 1 and {FORMAT}")
    missing = [key for key in KEYS if key not in manifest]
    if missing:
        raise Damage(f"{file} lacks {', '.join(missing)}")
    if manifest["sha256"] != _digest({key: value for key, value in manifest.items() if key != "sha256"}):
        raise Damage(f"{file} does not match its own hash")
    if raw != (_text(manifest) if manifest["format"] == FORMAT else _text_1(manifest)):
        raise Damage(f"{file} is not as it was written (its values are)")


def _check(file: Path, manifest: Mapping[str, Any]) -> None:
    """Types and ranges, before anything is opened or allocated by them."""

    def bad(what: str) -> NoReturn:
        raise Damage(f"{file}: {what[:200]}")

    chunk, files, tensors = manifest["chunk_bytes"], manifest["files"], manifest["tensors"]
    if not (_count(chunk) and 0 < chunk <= MOST_CHUNK_BYTES):
        bad(f"chunks of {chunk!r} bytes; at most {MOST_CHUNK_BYTES:,} are read")
    if not (_count(manifest["step"]) and _count(manifest["number"]) and isinstance(manifest["state"], dict)):
        bad("step, number or state is no such thing")
    if not (_number(manifest["time"]) and isinstance(manifest["permanent"], bool)):
        bad("time or permanent is no such thing")
    if not (isinstance(files, dict) and isinstance(tensors, dict)):
        bad("files or tensors is no table")
    for name, entry in files.items():
        if not SHARD.fullmatch(name):
            bad(f"{name!r} is no name of a shard")
        if not (isinstance(entry, dict) and _count(entry.get("bytes")) and isinstance(entry.get("sha256"), list)):
            bad(f"{name}: bytes or hashes are missing")
        if len(entry["sha256"]) != -(-entry["bytes"] // chunk):
            bad(f"{name}: {len(entry['sha256'])} hashes for {entry['bytes']:,} bytes in chunks of {chunk:,}")
    for name, entry in tensors.items():
        if not (isinstance(entry, dict) and _known(entry.get("dtype"), DTYPES) and _counts(entry.get("shape"))):
            bad(f"{name}: shape or dtype is no such thing")
        if math.prod(max(n, 1) for n in entry["shape"]) >= MOST_NUMBERS:  # torch takes no shape beyond, empty or not
            bad(f"{name}: no tensor is that large")
        if not isinstance(entry.get("pieces"), list):
            bad(f"{name}: it has no list of pieces")
        for piece in entry["pieces"]:
            if not (isinstance(piece, dict) and _counts(piece.get("offset")) and _counts(piece.get("size"))):
                bad(f"{name}: a piece without offset or size")
            inside = zip(piece["offset"], piece["size"], entry["shape"], strict=False)
            if not len(piece["offset"]) == len(piece["size"]) == len(entry["shape"]):
                bad(f"{name}: a piece of another number of dimensions")
            if not isinstance(piece.get("key", ""), str):
                bad(f"{name}: a piece whose key is no name")
            if not _known(piece.get("file"), files) or any(offset + size > end for offset, size, end in inside):
                bad(f"{name}: a piece outside the tensor, or in no file")


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _known(value: Any, names: Mapping[str, Any]) -> bool:
    return isinstance(value, str) and value in names


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(_count(v) for v in value)


# A manifest of many ranks has tens of megabytes, and one call of json keeps the training from running for as long as it
# takes. So the two large tables are written and hashed entry by entry.


def _plain(value: Any) -> Any:
    """As it will read back: keys are strings there, and tuples lists."""
    if isinstance(value, Mapping):
        return {_word(key): json.loads(json.dumps(finite(inner), allow_nan=False)) for key, inner in value.items()}
    return json.loads(json.dumps(finite(value), allow_nan=False))


def _word(key: object) -> str:
    return key if isinstance(key, str) else next(iter(json.loads(json.dumps({key: 0}))))


def _text(manifest: Mapping[str, Any]) -> bytes:
    """One line a key: short for a machine, and a person can still read the first lines."""
    lines = (f"{json.dumps(key)}: {''.join(_json(value, ', ', ': '))}" for key, value in manifest.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _text_1(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode()


def _digest(plain: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON (sorted keys, no spaces) of a document that was read from JSON."""
    digest = hashlib.sha256(b"{")
    for number, key in enumerate(sorted(plain)):
        digest.update(f"{',' if number else ''}{json.dumps(key)}:".encode())
        for part in _json(plain[key], ",", ":", sort=True):
            digest.update(part.encode())
    digest.update(b"}")
    return digest.hexdigest()


def _json(value: Any, comma: str, colon: str, *, sort: bool = False) -> Iterator[str]:
    """The parts of json.dumps(value), one an entry where it is a table."""
    if not isinstance(value, dict):
        yield json.dumps(value, allow_nan=False, separators=(comma, colon), sort_keys=sort)
        return
    yield "{"
    for number, key in enumerate(sorted(value) if sort else value):
        inner = json.dumps(value[key], allow_nan=False, separators=(comma, colon), sort_keys=sort)
        yield f"{comma if number else ''}{json.dumps(key)}{colon}{inner}"
    yield "}"
