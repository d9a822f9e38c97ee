"""Which files a corpus is made of, and what is said of the ones that are left out."""

import gzip
import os
from pathlib import Path

import pytest

from corpora import data_section, write_jsonl
from minka.data.corpus_files import find_files
from minka.data.prepare import prepare
from minka.data.read_documents import read_documents
from minka.data.token_store import TokenStore
from minka.plan.errors import UserError


def names(source: str, *paths: Path) -> list[str]:
    """The names of a corpus' files, in order."""
    found = find_files(data_section(source=source, paths=[str(path) for path in paths]))
    return [path.name for path in found.files]


def fill(folder: Path, *files: str) -> Path:
    """Make empty files."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("packed", ["", ".gz", ".zst", ".zstd", ".xz", ".bz2"])
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".JSON"])
def test_a_folder_is_searched_for_json_lines_plain_and_compressed(kind: str, packed: str, tmp_path: Path) -> None:
    folder = fill(tmp_path, f"c4-train.00000-of-01024{kind}{packed}", "README.md", "_SUCCESS", ".part-0.crc")
    found = find_files(data_section(source="jsonl", paths=[str(folder)]))
    assert [path.name for path in found.files] == [f"c4-train.00000-of-01024{kind}{packed}"]
    assert found.left_out == {".md": 1, "without a suffix": 1}


def test_json_next_to_json_lines_describes_them(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl.gz", "dataset_info.json", "b.jsonl.lz4", "c.csv")
    found = find_files(data_section(source="jsonl", paths=[str(tmp_path)]))
    assert [path.name for path in found.files] == ["a.jsonl.gz"]
    assert found.left_out == {".csv": 1, ".json": 1, ".jsonl.lz4": 1}


def test_of_many_suffixes_the_most_frequent_are_listed(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl", *(f"{i}.{chr(97 + i)}x" for i in range(25)), "again.cx")
    left_out = find_files(data_section(source="jsonl", paths=[str(tmp_path)])).left_out
    assert (len(left_out), left_out[".cx"], left_out["others"], sum(left_out.values())) == (21, 2, 5, 26)


def test_a_folder_without_files_of_the_source_says_what_it_has(tmp_path: Path) -> None:
    fill(tmp_path, "a.parquet", "b.parquet", "c.csv")
    with pytest.raises(UserError) as refusal:
        names("jsonl", tmp_path)
    assert "it has 2 .parquet, 1 .csv" in refusal.value.what


def test_links_are_followed_once_and_what_is_not_a_file_is_counted(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "b.jsonl")
    folder = fill(tmp_path / "corpus", "a.jsonl")
    (folder / "again.jsonl").symlink_to("a.jsonl")
    (folder / "gone.jsonl").symlink_to("nowhere")
    (folder / "loop").symlink_to(".")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe.jsonl")
    assert names("jsonl", folder) == ["a.jsonl", "b.jsonl"]
    assert names("jsonl", folder / "**" / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    left_out = find_files(data_section(source="jsonl", paths=[str(folder)])).left_out
    assert left_out == {"broken link": 1, "pipe or device, not a regular file": 1}
    of_glob = find_files(data_section(source="jsonl", paths=[str(folder / "*")]))
    assert [file.name for file in of_glob.files] == ["a.jsonl"]  # and not those of the folders that it matches
    assert of_glob.left_out == {**left_out, "folder": 2}
    assert find_files(data_section(source="jsonl", paths=[str(folder / "m*" / "**")])).left_out == {}


@pytest.mark.parametrize(
    ("name", "what"), [("gone", "broken link"), ("pipe", "pipe"), ("nothing", "no such file"), ("s3://x", "address")]
)
def test_a_path_that_is_not_a_file_is_described(name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError) as refusal:
        find_files(data_section(source="jsonl", paths=[f"{tmp_path}/{name}"]))
    assert what in refusal.value.what
    assert refusal.value.where.startswith(f"data.paths: {tmp_path}/{name[:2]}")


def test_a_folder_may_be_named_like_a_file(tmp_path: Path) -> None:
    assert names("jsonl", fill(tmp_path / "out.jsonl", "part-00000.json.gz")) == ["part-00000.json.gz"]


def test_names_that_are_not_text_are_stored_as_text(tmp_path: Path) -> None:
    """A sidecar of provenance is UTF-8, and a file's name is any bytes."""
    (tmp_path / "corpus").mkdir()
    for name in (b"caf\xe9.txt", b"new\nline.txt"):
        (tmp_path / "corpus" / os.fsdecode(name)).write_bytes(name)
    (tmp_path / "corpus" / os.fsdecode(b"\xff.txt")).write_text("more")
    prepare(data_section(source="text", paths=[str(tmp_path / "corpus")], bad_rows="skip"), 256, tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    paths = {store.split(name).provenance(0)["path"] for name in ("train", "validation")}
    assert paths == {f"{tmp_path}/corpus/new\nline.txt", f"{tmp_path}/corpus/\\xff.txt"}
    assert store.manifest.skipped
    assert store.manifest.skipped.first[0].startswith(f"{tmp_path}/corpus/caf\\xe9.txt:1: not UTF-8")


def test_files_that_were_left_out_are_in_the_manifest(tmp_path: Path) -> None:
    corpus = fill(tmp_path / "corpus", "notes.md", "old.jsonl.lz4")
    write_jsonl(corpus / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    (corpus / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}'))
    prepare(data_section(source="jsonl", paths=[str(corpus)]), 256, tmp_path / "store")
    manifest = TokenStore.open(tmp_path / "store").manifest
    assert list((manifest.left_out or {}).items()) == [
        (".jsonl.lz4", 1),
        (".md", 1),
    ]  # the store's hash follows from it
    assert "files in the folders of data.paths that were not read: 1 .jsonl.lz4, 1 .md" in manifest.notes
    assert len(list(read_documents(data_section(source="jsonl", paths=[str(corpus)])))) == 3
