"""A checkpoint made to do harm is refused at once, with nothing executed and nothing large allocated.

Those below are sealed anew wherever that is needed, so that no hash gives them away but only the check that is meant.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle  # noqa: TID251 - to make what must never be read
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minka.checkpoint.manifest import Damage, load_manifest, seal
from minka.checkpoint.restore import restore, restore_from, whole_tensors
from minka.plan.errors import UserError
from saved import ALONE, save, tensors

SHARD = "rank-00000.safetensors"
MOST_SECONDS, MOST_BYTES = 1.0, 8 * 2**20
MOST_WAIT = 10.0  # on a busy machine; what would block, would block for ever


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the hash that it then needs."""
    file = path / "manifest.json"
    body = json.loads(file.read_text())
    body = {key: value for key, value in body.items() if key not in ("sha256", "format")}
    change(body)
    file.unlink()
    file.write_bytes(seal(body))


def shard(path: Path, content: bytes) -> None:
    """Another shard, with a manifest that fits it."""
    (path / SHARD).write_bytes(content)
    hashes = [hashlib.sha256(content).hexdigest()] if content else []
    reseal(path, lambda m: m["files"].__setitem__(SHARD, {"bytes": len(content), "sha256": hashes}))


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
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"] = {name: manifest["files"][SHARD]}
        for entry in manifest["tensors"].values():
            for piece in entry["pieces"]:
                piece["file"] = name

    def spoil(path: Path) -> None:
        outside = Path(name) if name.startswith("/") else path / name
        with contextlib.suppress(OSError):  # where it may be written it is there, and whole
            outside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path / SHARD, outside)
        reseal(path, change)

    return spoil


def tensor(**changed: Any) -> Callable[[Path], None]:
    return lambda path: reseal(path, lambda m: m["tensors"]["model.w"].update(changed))


def piece(**changed: Any) -> Callable[[Path], None]:
    return lambda path: reseal(path, lambda m: m["tensors"]["model.w"]["pieces"][0].update(changed))


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


def nested_of_format_1(path: Path) -> str:
    """With a hash that holds: what writes JSON with indents gives up sooner than what reads it."""
    body = json.loads((path / "manifest.json").read_text())
    body = {key: body[key] for key in ("step", "files", "tensors")} | {"format": 1}
    body["state"] = {"a": json.loads("[" * 850 + "]" * 850)}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest})


def link_folder(path: Path) -> None:
    shutil.move(path, path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


HUGE = 2**60
HOSTILE: dict[str, Callable[[Path], object]] = {
    "a pickle for a shard": lambda path: shard(path, pickled(path)),
    "torch.save for a shard": lambda path: shard(path, torch_saved(path)),
    "a pickle for the manifest": lambda path: (path / "manifest.json").write_bytes(pickled(path)),
    "a pickle beside": lambda path: (path / "rank-00001.safetensors").write_bytes(pickled(path)),
    "DCP's metadata beside": lambda path: (path / "__0_0.distcp").write_bytes(pickled(path)),
    "a link for a shard": lambda path: move(path, SHARD, path.parent.parent / "shard"),
    "a link for the manifest": lambda path: move(path, "manifest.json", path.parent.parent / "manifest"),
    "a link for the folder": link_folder,
    "a link to nothing": lambda path: link(path, "/nonexistent"),
    "a link to a device": lambda path: link(path, "/dev/zero"),
    "a pipe for a shard": fifo(SHARD),
    "a pipe for the manifest": fifo("manifest.json"),
    "a file name with ..": rename_shard("../rank-00000.safetensors"),
    "a file name with .. inside": rename_shard("x/../rank-00000.safetensors"),
    "an absolute file name": rename_shard("/tmp/minka-rank-00000.safetensors"),
    "a file name with a line end": rename_shard("rank-00000.safetensors\n"),
    "no file name": rename_shard(""),
    "a header of 2^62 bytes": lambda path: shard(path, (2**62).to_bytes(8, "little") + b"{}" + bytes(100)),
    "a header of 2^64 - 1 bytes": lambda path: shard(path, b"\xff" * 8 + b"{}"),
    "a header of 99 MB": lambda path: shard(path, (99 * 10**6).to_bytes(8, "little") + b"{}"),
    "a shard of 7 bytes": lambda path: shard(path, bytes(7)),
    "a header that is a list": raw_header(b"[]"),
    "a header nested deep": raw_header(b"[" * 100_000),
    "a header of tables nested deep": raw_header(b'{"a":' * 50_000),
    "a header with a number of 10,000 digits": raw_header(b'{"a":' + b"9" * 10_000 + b"}"),
    "a header of another tensor": lambda path: header(path, lambda h: h.update(x=h.pop("model.w"))),
    "a header whose entry is null": lambda path: header(path, lambda h: h.update({"model.w": None})),
    "a header whose shape is 2^60": entry(shape=[HUGE, 3]),
    "a header whose shape is infinite": entry(shape=[float("inf"), 3]),
    "a header whose shape is NaN": entry(shape=[float("nan"), 3]),
    "a header whose shape is negative": entry(shape=[-7, -3]),
    "a header whose shape is no list": entry(shape=7),
    "a header whose offsets are 2^62": entry(data_offsets=[2**62, 2**62 + 84]),
    "a header whose offsets are negative": entry(data_offsets=[-84, 0]),
    "a header whose offsets are three": entry(data_offsets=[0, 42, 84]),
    "a header whose offsets run back": entry(data_offsets=[84, 0]),
    "a header whose type is unknown": entry(dtype="load"),
    "a header whose type is a list": entry(dtype=[]),
    "a header whose type is another": entry(dtype="I32"),
    "a shape of 2^60": tensor(shape=[HUGE, 3]),
    "a shape of 2^60 with its piece": lambda path: (tensor(shape=[HUGE, 3])(path), piece(size=[HUGE, 3])(path)),
    "a shape of 2^62 by 2^62 by 0": lambda path: (
        tensor(shape=[2**62, 2**62, 0])(path),
        piece(size=[0, 0, 0], offset=[0, 0, 0])(path),
    ),
    "a shape of 2^64": tensor(shape=[2**64, 3]),
    "a shape that is negative": tensor(shape=[-7, 3]),
    "a shape of truth": tensor(shape=[True, 3]),
    "a type called load": tensor(dtype="load"),
    "a type that is a list": tensor(dtype=["float32"]),
    "pieces that are a number": tensor(pieces=5),
    "pieces that are null": tensor(pieces=None),
    "pieces of numbers": tensor(pieces=[5]),
    "no pieces": tensor(pieces=[]),
    "one piece a hundred times": lambda path: reseal(
        path, lambda m: m["tensors"]["model.w"].update(pieces=100 * m["tensors"]["model.w"]["pieces"])
    ),
    "a piece of a file that is a list": piece(file=[]),
    "a piece of the manifest": piece(file="manifest.json"),
    "a piece beyond the tensor": piece(offset=[5, 0]),
    "a piece at 2^62": piece(offset=[2**62, 0]),
    "a piece of fewer dimensions": piece(offset=[0], size=[7]),
    "chunks of 2^40 bytes": top(chunk_bytes=2**40),
    "chunks of no bytes": top(chunk_bytes=0),
    "chunks of one byte": top(chunk_bytes=1),
    "chunks of NaN bytes": top(chunk_bytes="NaN"),
    "a file of 2^62 bytes": lambda path: reseal(path, lambda m: m["files"][SHARD].update(bytes=2**62)),
    "a file of 2^62 bytes in no chunks": lambda path: reseal(
        path, lambda m: m["files"][SHARD].update(bytes=2**62, sha256=[])
    ),
    "no files": top(files={}),
    "tensors that are a list": top(tensors=[]),
    "a state that is a list": top(state=[]),
    "a step that is a word": top(step="2"),
    "a step of 2^70": top(step=2**70),
    "a number of truth": top(number=True),
    "a time that is a table": top(time={}),
    "a permanence that is a word": top(permanent="yes"),
    "a state of format 1 nested deep": lambda path: (path / "manifest.json").write_text(nested_of_format_1(path)),
    "NaN for a number": text(lambda t: t.replace('"number": ', '"number": NaN, "n": ')),
    "a key twice": text(lambda t: t.replace('"step": 2', '"step": 7,\n"step": 2')),
    "a manifest nested deep": text(lambda t: "[" * 100_000),
    "a manifest of tables nested deep": text(lambda t: '{"format": ' * 50_000),
    "a format nested deep": text(lambda t: '{"format": ' + "[" * 900 + "]" * 900 + "}"),
    "a format of 100,000 letters": text(lambda t: json.dumps({"format": "x" * 100_000})),
    "a lone surrogate": text(lambda t: t.replace('"time"', '"\\ud800": 0,\n"time"')),
    "a manifest of zeros": lambda path: (path / "manifest.json").write_bytes(bytes(5000)),
    "a manifest of 2 TB of nothing": lambda path: os.truncate(path / "manifest.json", 2 * 10**12),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints, in a folder of their own."""
    for step in (1, 2):
        save(tmp_path / "checkpoints", step, tensors(step), {"step": step}, ALONE)
    return tmp_path / "checkpoints"


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Within a second, and without much memory: of Python by its own count, of torch by what the process may map."""
    tracemalloc.start()
    began, worked = time.perf_counter(), time.process_time()
    try:
        yield
        took, work = time.perf_counter() - began, time.process_time() - worked
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert took < MOST_WAIT
    assert work < MOST_SECONDS
    assert peak < MOST_BYTES, f"{peak:,} bytes"


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_made_to_do_harm_is_refused_at_once(what: str, run: Path) -> None:
    path = run / "step-00000002"
    HOSTILE[what](path)
    before = torch_bytes()
    with bounded():
        with pytest.raises(UserError) as caught:
            restore_from(path, tensors(), ALONE)
        assert len(str(caught.value)) < 2000
        assert ("no name of a shard" in str(caught.value)) == ("file name" in what)
        with contextlib.suppress(OSError, Damage):  # an export asks for nothing that might be missing
            list(whole_tensors(path, ""))
        for read in (load_manifest, lambda path: restore(path.parent, tensors(), ALONE, lambda p, reason: None)):
            with contextlib.suppress(OSError, Damage, UserError):
                read(path)
    assert torch_bytes() - before < MOST_BYTES
    assert not (run / "mark").exists()
    Path("/tmp/minka-rank-00000.safetensors").unlink(missing_ok=True)


def torch_bytes() -> int:
    """Most memory that this process has had so far: torch's is in none of Python's counts."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def test_a_bomb_would_go_off(tmp_path: Path) -> None:
    """That the pickles above do what they are said to, were they read."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))  # noqa: S301
    assert (tmp_path / "mark").is_dir()
