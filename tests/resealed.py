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

from minka.checkpoint.manifest import FORMAT, seal

SHARD = "rank-00000.safetensors"
TABLE = "rank-00000.json"
GOLDENS = Path(__file__).resolve().parent / "goldens" / "checkpoints"


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the values of manifest, index and table, and give all of them the hashes that they then need.

    `change` gets those of the header, with those of "index" and "table", which are of one rank.
    """
    header, index, table = (json.loads((path / name).read_text()) for name in ("manifest.json", "index.json", TABLE))
    body = {key: value for key, value in header.items() if key not in ("sha256", "format")}
    body |= {"index": index, "table": table}
    change(body)
    table, index = json.dumps(body.pop("table")).encode(), body["index"]
    (path / TABLE).write_bytes(table)
    if index.get("table_sha256"):
        index |= {"table_bytes": [len(table)], "table_sha256": [hashlib.sha256(table).hexdigest()]}
    content = json.dumps(index).encode()
    (path / "index.json").write_bytes(content)
    (path / "manifest.json").unlink()
    body["index"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_bytes(seal(body))


def shard(path: Path, content: bytes) -> None:
    """A different shard, with a table that fits it."""
    (path / SHARD).write_bytes(content)

    hashes = [hashlib.sha256(content).hexdigest()] if content else []
    reseal(path, sized(len(content), hashes))


def sized(size: int, hashes: list[str]) -> Callable[[dict[str, Any]], None]:
    """A shard of so many bytes, with these hashes."""

    def change(body: dict[str, Any]) -> None:
        body["index"]["bytes"] = [size]
        body["table"].update(bytes=size, sha256=hashes)

    return change


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


def file_name(name: str) -> Callable[[Path], object]:
    """A file of format 2 with this name, which is there, and whole, where it may be written."""

    def spoil(path: Path) -> None:
        old_manifest(lambda m: m.update(files={name: m["files"][SHARD]}), 2)(path)
        outside = Path(name) if name.startswith("/") else path / name
        with contextlib.suppress(OSError):
            outside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path / SHARD, outside)

    return spoil


def index(**changed: Any) -> Callable[[Path], None]:
    """Other entries in the index."""
    return lambda path: reseal(path, lambda m: m["index"].update(changed))


def table(**changed: Any) -> Callable[[Path], None]:
    """Other entries in the table."""
    return lambda path: reseal(path, lambda m: m["table"].update(changed))


def group(values: dict[str, Any]) -> dict[str, Any]:
    """The one of model.w."""
    (found,) = [one for one in values["groups"] if "model.w" in one.get("keys", one.get("tensors"))]
    assert isinstance(found, dict)
    return found


def piece(**changed: Any) -> Callable[[Path], None]:
    """Other values of model.w in the table."""
    return lambda path: reseal(path, lambda m: group(m["table"]).update(changed))


def tensor(**changed: Any) -> Callable[[Path], None]:
    """Other values of model.w in the index."""
    return lambda path: reseal(path, lambda m: group(m["index"]).update(changed))


def both(**changed: Any) -> Callable[[Path], None]:
    """Other values of model.w, the same in table and index."""

    def change(body: dict[str, Any]) -> None:
        stored = group(body["table"])
        stored.update(changed)
        boxes = [0, *stored["offset"], *stored["size"]]
        group(body["index"]).update(dtype=stored["dtype"], shape=stored["shape"], boxes=boxes)

    return lambda path: reseal(path, change)


def repeat_piece(path: Path) -> None:
    """model.w a hundred times, in the table and in the file's header."""
    header(path, lambda h: h.update({f"model.w#{number}": h["model.w"] for number in range(1, 100)}))
    reseal(path, lambda m: group(m["table"]).update(keys=["model.w", *(f"model.w#{n}" for n in range(1, 100))]))


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
        change(body)
        write_manifest(path, body)

    return spoil


def write_manifest(path: Path, body: dict[str, Any]) -> None:
    """A manifest of any format with these values, and a hash that holds."""
    number = body["format"]
    body.pop("sha256", None)
    (path / "manifest.json").unlink()
    if number == FORMAT:
        (path / "manifest.json").write_bytes(seal({key: value for key, value in body.items() if key != "format"}))
        return
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in body.items())
    text = json.dumps(body, indent=2) + "\n" if number == 1 else f"{{\n{lines}\n}}\n"
    (path / "manifest.json").write_text(text)


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
