"""Bad input is refused with status 2 and an error that says where and what would work; nothing is left on disk."""

import errno
import gc
import gzip
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpora import data_section, run_config, texts, write_jsonl
from minka.data.command import main
from minka.data.prepare import open_or_prepare, prepare
from minka.data.split_writer import SplitWriter
from minka.data.token_store import TokenStore
from minka.plan.errors import UserError

MIB = 2**20


def refused(tmp_path: Path, vocab: int = 256, **fields: Any) -> UserError:
    """The error of preparing such a corpus into tmp_path/out/store; nothing of it may remain."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        prepare(data_section(**fields), vocab, tmp_path / "out" / "store")
    assert int(caught.value.status) == 2
    assert sorted(tmp_path.rglob("*")) == before
    assert caught.value.where or caught.value.remedy
    return caught.value


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_a_missing_corpus_is_named(source: str, tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere")
    assert refused(tmp_path, source=source, paths=[path]).where == f"data.paths: {path}"


def test_a_glob_and_a_folder_that_match_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for source, path in (("text", str(tmp_path / "*.md")), ("jsonl", str(tmp_path))):
        assert refused(tmp_path, source=source, paths=[path]).where == f"data.paths: {path}"


@pytest.mark.parametrize("given", [[], ["", ""]])
def test_a_corpus_without_text_is_refused(given: list[str], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in given])
    error = refused(tmp_path, source="jsonl", paths=[str(path)])
    assert str(path) in error.where
    assert ("2 documents" in error.why) == bool(given)


def test_a_limit_that_no_document_fits_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "abcdef"}])
    assert "data.max_bytes=5" in refused(tmp_path, source="jsonl", paths=[str(path)], max_bytes=5).why


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("all in one file")
    assert refused(tmp_path, source="text", paths=[str(tmp_path)]).where == "data.source=text"
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "same"}] * 3)
    assert "all 3 documents" in refused(tmp_path, source="jsonl", paths=[str(path)]).what


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_text_that_is_not_utf8_names_file_line_and_byte(source: str, tmp_path: Path) -> None:
    file = tmp_path / ("a.txt" if source == "text" else "a.jsonl")
    file.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    error = refused(tmp_path, source=source, paths=[str(file)])
    offset = 30 if source == "text" else 13
    assert error.where == f"{file}:2"
    assert re.findall(r"0x..|\d+$", error.what) == ["0xe9", str(offset)]


@pytest.mark.parametrize(
    ("line", "what", "remedy"),
    [
        ("{'text': 'x'}", "JSON", ""),
        ('{"text": "x"', "JSON", ""),
        ('{"body": "x"}', "'text'", "body"),
        ('{"text": null}', "null", "remove the row"),
        ('{"text": 3, "body": "x"}', "int", "data.text_field to a field with text: body"),
        ('["x"]', "list", ""),
        ('{"text": "\\ud800"}', "character 0", ""),
    ],
)
def test_a_bad_line_of_jsonl_is_named_by_file_and_line(line: str, what: str, remedy: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    error = refused(tmp_path, source="jsonl", paths=[str(file)])
    assert error.where == f"{file}:3"
    assert what in error.what
    assert remedy in error.remedy


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("content", [b"not compressed at all", gzip.compress(b'{"text": "x"}\n' * 99)[:-20]])
def test_a_damaged_archive_is_named(suffix: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(content)
    assert str(file) in refused(tmp_path, source="jsonl", paths=[str(file)]).where


def test_a_parquet_file_without_the_column_lists_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "url": ["y"]}), tmp_path / "a.parquet")
    error = refused(tmp_path, source="parquet", paths=[str(tmp_path)])
    assert error.where == str(tmp_path / "a.parquet")
    assert "'text'" in error.what
    assert "body, url" in error.remedy


def test_files_that_are_not_parquet_and_columns_that_are_not_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 but not really")
    assert refused(tmp_path, source="parquet", paths=[str(tmp_path)]).where == str(file)
    pq.write_table(pa.table({"text": [1, 2]}), file)
    error = refused(tmp_path, source="parquet", paths=[str(tmp_path)])
    assert error.where == f"{file}:1"
    assert "int" in error.what


def test_what_datasets_cannot_open_is_refused_with_its_reason(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere.json")
    error = refused(tmp_path, source="datasets", dataset="json", paths=[missing])
    assert error.where == "data.dataset: json train"
    assert missing in error.what
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "x"}])
    error = refused(tmp_path, source="datasets", dataset="json", paths=[str(path)])
    assert (error.where, "'text'" in error.what, "body" in error.remedy) == ("json:1", True, True)


def test_a_vocabulary_the_corpus_cannot_fill_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(5)])
    error = refused(tmp_path, vocab=50_000, source="jsonl", paths=[str(path)], tokenizer="bpe")
    assert error.where == "model.vocab=50000"
    assert "model.vocab=" in error.remedy


@pytest.mark.parametrize("below", ["/sys", "a file"])
def test_a_folder_that_may_not_be_written_is_refused(below: str, corpus: Path, tmp_path: Path) -> None:
    """Tests may run as root, whom permissions do not stop: the kernel's own folder and a path below a file do."""
    (tmp_path / "file").write_text("in the way")
    parent = Path("/sys") if below == "/sys" else tmp_path / "file"
    with pytest.raises(UserError) as caught:
        prepare(data_section(source="jsonl", paths=[str(corpus)]), 256, parent / "minka-store")
    assert (caught.value.status, caught.value.where) == (2, str(parent / "minka-store"))
    assert "data.store=" in caught.value.remedy
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.fixture
def small_disk(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder on a disk of 1 MiB, and the command prefix under which it exists (a mount of our own)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=1m minka {disk} && "$@"; status=$?; ls -A {disk} >{tmp_path}/left; exit $status'
    return disk, ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]


def fill(folder: Path, tmp_path: Path, prefix: list[str], limit: Callable[[], None] | None = None) -> dict[str, Any]:
    """Prepare 4 MiB of text, 8 MiB of tokens, into `folder` in a child that must fail; returns its error."""
    write_jsonl(tmp_path / "big.jsonl", [{"text": f"{i} " + "abcdefgh" * 128} for i in range(4 * 1024)])
    sets = ["data.source=jsonl", f'data.paths=["{tmp_path}/big.jsonl"]', f"data.store={folder}"]
    sets += ["data.tokenizer=bytes", "model.vocab=256"]
    command = [sys.executable, "-m", "minka", "data", "prepare", "demo", *sets, "--json"]
    done = subprocess.run(prefix + command, capture_output=True, text=True, preexec_fn=limit, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    error: dict[str, Any] = json.loads(done.stdout)
    assert error["where"] == str(folder)
    needed, written, _ = mebibytes(error)
    assert 7 < needed < 10
    assert 0.5 < written < 2  # the sidecar is not in a limit of one file
    return error


def mebibytes(error: dict[str, Any]) -> list[float]:
    """The sizes in an error's reason: needed, written, free."""
    return [float(size.replace(",", "")) for size in re.findall(r"([\d,.]+) MiB", error["why"])]


def can_mount(prefix: list[str]) -> bool:
    """Whether this machine lets us mount a disk of our own."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0


def test_a_full_disk_says_what_is_needed_and_what_is_free_and_is_left_empty(
    small_disk: tuple[Path, list[str]],
    tmp_path: Path,
    source_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real disk of 1 MiB where this machine lets us mount one; else a limit on the size of files, as real."""
    monkeypatch.setenv("PYTHONPATH", source_environment["PYTHONPATH"])
    disk, prefix = small_disk
    if can_mount(prefix):
        error = fill(disk / "store", tmp_path, prefix)
        assert os.strerror(errno.ENOSPC) in error["error"]
        assert mebibytes(error)[2] == 1.0
        assert (tmp_path / "left").read_text() == ""
    else:
        limited(disk / "store", tmp_path)


def limited(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The same under a file-size limit of 1 MiB."""
    return fill(folder, tmp_path, [], lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB)))


def test_a_file_size_limit_is_a_full_disk_too(
    tmp_path: Path, source_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", source_environment["PYTHONPATH"])
    assert os.strerror(errno.EFBIG) in limited(tmp_path / "out" / "store", tmp_path)["error"]
    assert os.listdir(tmp_path) == ["big.jsonl"]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_writer_whose_disk_is_gone_does_not_complain_again_when_it_is_collected(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"), SplitWriter(tmp_path, "train", np.dtype("<u2"), 255) as writer:
        writer._sidecar.close()  # its table cannot write its end any more
        raise OSError("gone")
    del writer
    gc.collect()


def test_a_folder_that_is_not_a_store_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    section = data_section(source="jsonl", paths=[str(corpus)])
    data = section.model_dump() | {"store": str(tmp_path / "mine"), "seq_len": 8, "batch_tokens": 32}
    for name, use in (
        ("mine", lambda path: prepare(section, 256, path)),
        ("mine/thesis.txt", lambda path: prepare(section, 256, path)),
        ("mine", lambda path: open_or_prepare(run_config(data=data), tmp_path)),
        ("mine", TokenStore.open),
        ("nowhere", TokenStore.open),
    ):
        with pytest.raises(UserError) as caught:
            use(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_errors_are_json_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "nowhere.toml"), "--json"]) == 2
    error = json.loads(capsys.readouterr().out)
    assert error["status"] == 2
    assert error["error"]
