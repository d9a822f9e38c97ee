"""A checkpoint made to do harm is refused at once, with nothing executed and nothing large allocated.

Those below are sealed anew wherever that is needed, so that no hash gives them away but only the check that is meant.
"""

import contextlib
import json
import os
import pickle  # noqa: TID251 - to make what must never be read
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minka.checkpoint.manifest import Damage, read_header
from minka.checkpoint.restore import restore, restore_from, whole_tensors
from minka.plan.errors import UserError
from resealed import (
    SHARD,
    Bomb,
    both,
    entry,
    fifo,
    file_name,
    header,
    index,
    link,
    link_folder,
    move,
    nested_of_format_1,
    old_manifest,
    old_piece,
    pickled,
    piece,
    raw_header,
    repeat_piece,
    reseal,
    shard,
    sized,
    table,
    tensor,
    text,
    top,
    torch_saved,
)
from saved import ALONE, save, silent, tensors

MOST_SECONDS, MOST_BYTES = 20.0, 8 * 2**20  # of CPU time, where a tenth of a second is usual


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
    "a file name with ..": file_name("../rank-00000.safetensors"),
    "a file name with .. inside": file_name("x/../rank-00000.safetensors"),
    "an absolute file name": file_name("/tmp/minka-rank-00000.safetensors"),
    "a file name with a line end": file_name("rank-00000.safetensors\n"),
    "no file name": file_name(""),
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
    "a shape of 2^60": both(shape=[HUGE, 3]),
    "a shape of 2^60 with its piece": both(shape=[HUGE, 3], size=[HUGE, 3]),
    "a shape of 2^62 by 2^62 by 0": both(shape=[2**62, 2**62, 0], size=[0, 0, 0], offset=[0, 0, 0]),
    "a shape of 2^59 by 2^59": both(shape=[2**59, 2**59]),
    "a shape of 2^64": both(shape=[2**64, 3]),
    "a shape that is negative": both(shape=[-7, 3]),
    "a shape of truth": both(shape=[True, 3]),
    "a shape of the index alone": tensor(shape=[7, 4]),
    "a type called load": both(dtype="load"),
    "a type that is a list": both(dtype=["float32"]),
    "a type of the index alone": tensor(dtype="int32"),
    "a tensor in two groups": tensor(tensors=["model.w", "model.b"]),
    "tensors that are numbers": tensor(tensors=[5]),
    "boxes that are a number": tensor(boxes=5),
    "boxes that are null": tensor(boxes=None),
    "boxes of lists": tensor(boxes=[[0, 0, 0, 7, 3]]),
    "no boxes": tensor(boxes=[]),
    "a box cut short": tensor(boxes=[0, 0, 0, 7]),
    "a box of a rank that is not there": tensor(boxes=[1, 0, 0, 7, 3]),
    "a box of a negative rank": tensor(boxes=[-1, 0, 0, 7, 3]),
    "a box at 2^59": tensor(boxes=[0, 2**59, 0, 7, 3]),
    "a box at 2^63": tensor(boxes=[0, 2**63, 0, 7, 3]),
    "groups of the table that are a number": table(groups=5),
    "groups of the table that are null": table(groups=None),
    "groups of the table of numbers": table(groups=[5]),
    "no pieces": table(groups=[]),
    "one piece a hundred times": repeat_piece,
    "one piece twice": piece(keys=["model.w", "model.w"]),
    "a piece with a file": piece(file="manifest.json"),
    "a piece beyond the tensor": piece(offset=[5, 0]),
    "a piece at 2^59": piece(offset=[2**59, 0]),
    "a piece of fewer dimensions": both(offset=[0], size=[7]),
    "a piece of fewer dimensions in the table alone": piece(offset=[0], size=[7]),
    "a table with an unknown key": table(more=1),
    "a hash too few": table(sha256=[]),
    "a hash that is a number": table(sha256=[5]),
    "no table": index(table_bytes=[], table_sha256=[]),
    "a table of another size than the shard": index(bytes=[5]),
    "two shards": index(bytes=[5, 5]),
    "format 2, a piece of a file that is a list": old_piece(file=[]),
    "format 2, a piece of the manifest": old_piece(file="manifest.json"),
    "format 2, a piece at 2^62": old_piece(offset=[2**62, 0]),
    "format 2, a piece beyond the tensor": old_piece(offset=[5, 0]),
    "format 2, a piece of fewer dimensions": old_piece(offset=[0], size=[7]),
    "format 2, pieces that are a number": old_manifest(lambda m: next(iter(m["tensors"].values())).update(pieces=5), 2),
    "format 2, tensors that are a list": old_manifest(lambda m: m.update(tensors=[]), 2),
    "format 1, files that are a list": old_manifest(lambda m: m.update(files=[])),
    "format 1, no files": old_manifest(lambda m: m.pop("files")),
    "format 1, a state that is a list": old_manifest(lambda m: m.update(state=[])),
    "format 1, a name with ..": old_manifest(
        lambda m: m.update(files={"../x.safetensors": next(iter(m["files"].values()))})
    ),
    "chunks of 2^40 bytes": top(chunk_bytes=2**40),
    "chunks of no bytes": top(chunk_bytes=0),
    "chunks of one byte": top(chunk_bytes=1),
    "chunks of NaN bytes": top(chunk_bytes="NaN"),
    "a file of 2^59 bytes": index(bytes=[2**59]),
    "a file of 2^59 bytes in no chunks": lambda path: reseal(path, sized(2**59, [])),
    "no files": index(bytes=[]),
    "files that are a number": index(bytes=5),
    "groups that are a number": index(groups=5),
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
    restore(tmp_path / "checkpoints", tensors(), ALONE, silent)  # what is allocated once is allocated here
    return tmp_path / "checkpoints"


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """With little work and memory: of Python by its own count, of torch by what the process may map."""
    tracemalloc.start()
    began = time.process_time()
    try:
        yield
        work = time.process_time() - began
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
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
        assert what.find("file name") < 0 or "manifest.json: its tables are wrong" in str(caught.value)
        with contextlib.suppress(OSError, Damage):  # an export asks for nothing that might be missing
            list(whole_tensors(path, ""))
        for read in (read_header, lambda path: restore(path.parent, tensors(), ALONE, lambda p, reason: None)):
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
