"""Bad input: each is one paragraph that says where and what would work, exit status 2, and leaves nothing behind."""

import gc
import gzip
import json
import os
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
    """The error of preparing such a corpus into tmp_path/out/store; nothing of it may stay."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        prepare(data_section(**fields), vocab, tmp_path / "out" / "store")
    assert int(caught.value.status) == 2
    assert sorted(tmp_path.rglob("*")) == before
    assert caught.value.where or caught.value.remedy
    return caught.value


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_a_missing_corpus_is_named(source: str, tmp_path: Path) -> None:
    error = refused(tmp_path, source=source, paths=[str(tmp_path / "nowhere")])
    assert str(tmp_path / "nowhere") in str(error)
    assert "no such file or folder" in str(error)


def test_a_glob_and_a_folder_that_match_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert "glob matches no file" in str(refused(tmp_path, source="text", paths=[str(tmp_path / "*.md")]))
    assert "no .jsonl or" in str(refused(tmp_path, source="jsonl", paths=[str(tmp_path)]))


@pytest.mark.parametrize("given", [[], ["", ""]])
def test_a_corpus_without_text_is_refused(given: list[str], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in given])
    assert "the corpus has no text" in str(refused(tmp_path, source="jsonl", paths=[str(path)]))


def test_a_limit_that_no_document_fits_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "abcdef"}])
    assert "data.max_bytes=5" in str(refused(tmp_path, source="jsonl", paths=[str(path)], max_bytes=5))


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("all in one file")
    assert "one single document" in str(refused(tmp_path, source="text", paths=[str(tmp_path)]))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "same"}] * 3)
    assert "all 3 documents are the same text" in str(refused(tmp_path, source="jsonl", paths=[str(path)]))


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_text_that_is_no_utf8_names_file_line_and_byte(source: str, tmp_path: Path) -> None:
    file = tmp_path / ("a.txt" if source == "text" else "a.jsonl")
    file.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    error = refused(tmp_path, source=source, paths=[str(file)])
    offset = 30 if source == "text" else 13
    assert error.where == f"{file}:2"
    assert f"byte 0xe9 at byte offset {offset}" in str(error)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{'text': 'x'}", "no JSON"),
        ('{"text": "x"', "no JSON"),
        ('{"body": "x"}', "the row has no 'text'.*to one of the row's fields: body"),
        ('{"text": null}', "'text' is null"),
        ('{"text": 3}', "'text' is int"),
        ('["x"]', "no object but list"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_of_jsonl_is_named_by_file_and_line(line: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    error = refused(tmp_path, source="jsonl", paths=[str(file)])
    assert error.where == f"{file}:3"
    with pytest.raises(UserError, match=says):
        raise error


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("content", [b"not compressed at all", gzip.compress(b'{"text": "x"}\n' * 99)[:-20]])
def test_a_damaged_archive_is_named(suffix: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(content)
    assert str(file) in refused(tmp_path, source="jsonl", paths=[str(file)]).where


def test_a_parquet_file_without_the_column_lists_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "url": ["y"]}), tmp_path / "a.parquet")
    error = refused(tmp_path, source="parquet", paths=[str(tmp_path)])
    assert "no column 'text'" in str(error)
    assert "body, url" in error.remedy


def test_what_is_no_parquet_and_columns_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    assert "cannot be read as Parquet" in str(refused(tmp_path, source="parquet", paths=[str(tmp_path)]))
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert "'text' is int, no text" in str(refused(tmp_path, source="parquet", paths=[str(tmp_path)]))


def test_what_datasets_cannot_open_is_refused_with_its_reason(tmp_path: Path) -> None:
    missing = [str(tmp_path / "nowhere.json")]
    assert "datasets could not read it" in str(refused(tmp_path, source="datasets", dataset="json", paths=missing))
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "x"}])
    error = refused(tmp_path, source="datasets", dataset="json", paths=[str(path)])
    assert "the row has no 'text'" in str(error)


def test_a_vocabulary_the_corpus_cannot_fill_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(5)])
    error = refused(tmp_path, vocab=50_000, source="jsonl", paths=[str(path)], tokenizer="bpe")
    assert "entries of a vocabulary of 50000" in str(error)
    assert "set model.vocab=" in str(error)


@pytest.mark.parametrize("below", ["/sys", "a file"])
def test_a_folder_that_may_not_be_written_is_refused(below: str, corpus: Path, tmp_path: Path) -> None:
    """Tests may run as root, whom permissions do not stop: the kernel's own folder and a path below a file do."""
    (tmp_path / "file").write_text("in the way")
    parent = Path("/sys") if below == "/sys" else tmp_path / "file"
    with pytest.raises(UserError, match=r"the store cannot be written.*data.store=FOLDER") as caught:
        prepare(data_section(source="jsonl", paths=[str(corpus)]), 256, parent / "minka-store")
    assert caught.value.status == 2
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.fixture
def small_disk(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder on a disk of 1 MiB, and the command prefix under which it is there (a mount of our own)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=1m minka {disk} && "$@"; status=$?; ls -A {disk} >{tmp_path}/left; exit $status'
    return disk, ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]


def fill(folder: Path, tmp_path: Path, prefix: list[str], limit: Callable[[], None] | None = None) -> tuple[int, str]:
    """Prepare 4 MiB of text into `folder` in a child; returns its status and what it said."""
    write_jsonl(tmp_path / "big.jsonl", [{"text": f"{i} " + "abcdefgh" * 128} for i in range(4 * 1024)])
    sets = ["data.source=jsonl", f'data.paths=["{tmp_path}/big.jsonl"]', f"data.store={folder}"]
    command = [
        sys.executable,
        "-m",
        "minka",
        "data",
        "prepare",
        "demo",
        "data.tokenizer=bytes",
        "model.vocab=256",
        *sets,
    ]
    done = subprocess.run(
        prefix + command, capture_output=True, text=True, preexec_fn=limit, timeout=120, check=False, cwd=tmp_path
    )
    return done.returncode, done.stderr


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
        status, said = fill(disk / "store", tmp_path, prefix)
        assert "the disk ran full" in said
        assert "1.0 MiB are free" in said
        assert (tmp_path / "left").read_text() == ""
    else:
        status, said = limited(disk / "store", tmp_path)
    assert (status, "MiB are needed" in said, "Traceback" in said) == (2, True, False), said
    assert "Exception ignored" not in said


def limited(folder: Path, tmp_path: Path) -> tuple[int, str]:
    """The same under a file-size limit of 1 MiB."""
    return fill(folder, tmp_path, [], lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB)))


def test_a_file_size_limit_is_a_full_disk_too(
    tmp_path: Path, source_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", source_environment["PYTHONPATH"])
    status, said = limited(tmp_path / "out" / "store", tmp_path)
    assert (status, "file-size limit" in said, "Traceback" in said) == (2, True, False), said
    assert "Exception ignored" not in said
    assert os.listdir(tmp_path) == ["big.jsonl"]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_writer_whose_disk_is_gone_does_not_complain_once_more_when_it_goes(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"), SplitWriter(tmp_path, "train", np.dtype("<u2"), 255) as writer:
        writer._sidecar.close()  # its table cannot write its end any more
        raise OSError("gone")
    del writer
    gc.collect()


def test_what_is_no_store_is_not_written_over(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    section = data_section(source="jsonl", paths=[str(corpus)])
    with pytest.raises(UserError, match="is there and is no token store"):
        prepare(section, 256, tmp_path / "mine")
    with pytest.raises(UserError, match="a file of this name is in the way"):
        prepare(section, 256, tmp_path / "mine" / "thesis.txt")
    data = section.model_dump() | {"store": str(tmp_path / "mine"), "seq_len": 8, "batch_tokens": 32}
    with pytest.raises(UserError, match="is no token store"):
        open_or_prepare(run_config(data=data), tmp_path)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UserError, match="no token store: it has no manifest"):
        TokenStore.open(tmp_path / "mine")
    with pytest.raises(UserError, match="there is no such store"):
        TokenStore.open(tmp_path / "nowhere")


def test_errors_are_json_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    assert main(["verify", str(tmp_path / "nowhere.toml"), "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["status"] == 2
    assert said["error"]
