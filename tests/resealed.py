"""Checkpoints that are made to do harm: every hash is made anew, so that only the check that is meant can find them."""

import contextlib
import hashlib
import io
import json
import os
import pickle  # noqa: TID251 - to make what must never be read
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minka.checkpoint.manifest import seal

SHARD = "rank-00000.safetensors"
GOLDENS = Path(__file__).resolve().parent / "goldens" / "checkpoints"


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the values of manifest, index and table, and give all of them the hashes that they then need.

    `change` gets {"files": those of the index, each with its "table", "partitions", "tensors", and the header}.
    """
    header, index = (json.loads((path / name).read_text()) for name in ("manifest.json", "index.json"))
    for name, entry in index["files"].items():
        entry["table"] = json.loads((path / name.replace("safetensors", "json")).read_text())
    body = {key: value for key, value in header.items() if key not in ("sha256", "format", "index")} | index
    change(body)
    index = {key: body.pop(key) for key in ("files", "partitions", "tensors")}
    for entry in index["files"].values():
        content = json.dumps(entry["table"]).encode()
        (path / SHARD.replace("safetensors", "json")).write_bytes(content)
        entry["table"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    content = json.dumps(index).encode()
    (path / "index.json").write_bytes(content)
    (path / "manifest.json").unlink()
    body["index"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_bytes(seal(body))


def shard(path: Path, content: bytes) -> None:
    """A different shard, with a table that fits it."""
    (path / SHARD).write_bytes(content)

    def change(body: dict[str, Any]) -> None:
        hashes = [hashlib.sha256(content).hexdigest()] if content else []
        body["files"][SHARD]["bytes"] = len(content)
        body["files"][SHARD]["table"].update(bytes=len(content), sha256=hashes)

    reseal(path, change)


def header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another safetensors header over the same numbers."""
    content = (path / SHARD).read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    shard(path, len(text).to_bytes(8, "little") + text + content[8 + length :])


def raw_header(text: bytes) -> Callable[[Path], object]:
    return lambda path: shard(path, len(text).to_bytes(8, "little") + text)


def move(path: Path, name: str, target: Path) -> None:
    """A link in a file's place, to the very file: only that it is a link is wrong."""
    shutil.move(path / name, target)
    (path / name).symlink_to(target)


def link(path: Path, target: str) -> None:
    (path / SHARD).unlink()
    (path / SHARD).symlink_to(target)


def rename_shard(name: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        outside = Path(name) if name.startswith("/") else path / name
        with contextlib.suppress(OSError):  # where it may be written it is there, and whole
            outside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path / SHARD, outside)
        reseal(path, lambda m: m.update(files={name: m["files"][SHARD]}))

    return spoil


def table(**changed: Any) -> Callable[[Path], None]:
    """Other entries in the table."""
    return lambda path: reseal(path, lambda m: m["files"][SHARD]["table"].update(changed))


def empty_of(size: int) -> Callable[[dict[str, Any]], None]:
    """A shard of so many bytes, without a hash."""

    def change(body: dict[str, Any]) -> None:
        body["files"][SHARD]["bytes"] = size
        body["files"][SHARD]["table"].update(bytes=size, sha256=[])

    return change


def piece(**changed: Any) -> Callable[[Path], None]:
    """Other values of model.w in the table."""
    return lambda path: reseal(path, lambda m: m["files"][SHARD]["table"]["pieces"]["model.w"].update(changed))


def partition(**changed: Any) -> Callable[[Path], None]:
    """Another partition of model.w in the index."""
    return lambda path: reseal(path, lambda m: m["partitions"][m["tensors"]["model.w"]["partition"]].update(changed))


def both(**changed: Any) -> Callable[[Path], None]:
    """Other values of model.w, the same in table and index."""

    def change(body: dict[str, Any]) -> None:
        stored = body["files"][SHARD]["table"]["pieces"]["model.w"]
        stored.update(changed)
        boxes = [0, *stored["offset"], *stored["size"]]
        body["partitions"][body["tensors"]["model.w"]["partition"]] = {"shape": stored["shape"], "boxes": boxes}
        body["tensors"]["model.w"]["dtype"] = stored["dtype"]

    return lambda path: reseal(path, change)


def repeated(body: dict[str, Any]) -> None:
    """model.w a hundred times, in the table and in the file's header."""
    pieces = body["files"][SHARD]["table"]["pieces"]
    pieces.update({f"model.w#{number}": pieces["model.w"] for number in range(1, 100)})


def repeat_piece(path: Path) -> None:
    header(path, lambda h: h.update({f"model.w#{number}": h["model.w"] for number in range(1, 100)}))
    reseal(path, repeated)


def tensor(**changed: Any) -> Callable[[Path], None]:
    return lambda path: reseal(path, lambda m: m["tensors"]["model.w"].update(changed))


def top(**changed: Any) -> Callable[[Path], None]:
    return lambda path: reseal(path, lambda m: m.update(changed))


def text(change: Callable[[str], str]) -> Callable[[Path], object]:
    """Another text of the manifest, which no seal can help."""
    return lambda path: (path / "manifest.json").write_text(change((path / "manifest.json").read_text()))


def entry(**changed: Any) -> Callable[[Path], None]:
    return lambda path: header(path, lambda h: h["model.w"].update(changed))


def fifo(name: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return spoil


def pickled(path: Path) -> bytes:
    return pickle.dumps(Bomb(path.parent / "mark"))


def torch_saved(path: Path) -> bytes:
    file = io.BytesIO()
    torch.save(Bomb(path.parent / "mark"), file)
    return file.getvalue()


def old_manifest(change: Callable[[dict[str, Any]], object], number: int = 1) -> Callable[[Path], object]:
    """The golden of format 1 or 2 in the checkpoint's place, with other values and a hash that holds."""

    def spoil(path: Path) -> None:
        shutil.rmtree(path)
        shutil.copytree(GOLDENS / f"format-{number}" / "step-00000004", path)
        body = json.loads((path / "manifest.json").read_text()) | {"step": 2}
        del body["sha256"]
        change(body)
        body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in body.items())
        text = json.dumps(body, indent=2) + "\n" if number == 1 else f"{{\n{lines}\n}}\n"
        (path / "manifest.json").write_text(text)

    return spoil


def old_piece(**changed: Any) -> Callable[[Path], object]:
    return old_manifest(lambda m: next(iter(m["tensors"].values()))["pieces"][0].update(changed), 2)


def nested_of_format_1(path: Path) -> str:
    """With a hash that holds: what writes JSON with indents gives up sooner than what reads it."""
    body = {"format": 1, "step": 2, "files": {}, "tensors": {}, "state": {"a": json.loads("[" * 850 + "]" * 850)}}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest})


def link_folder(path: Path) -> None:
    shutil.move(path, path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")
