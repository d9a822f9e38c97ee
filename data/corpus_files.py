"""The files of a corpus: which ones data.paths names, and which files of its folders were left out."""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from minka.data.text_file import shown
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError

PACKED = ("", ".gz", ".gzip", ".zst", ".zstd", ".xz", ".bz2")
JSONL = tuple("".join(pair) for pair in product((".jsonl", ".ndjson"), PACKED))
JSON = tuple(".json" + packed for packed in PACKED)
# Of a folder, the files with the first of these groups of suffixes that occurs; an empty group is every file. A .json
# next to .jsonl files describes them.
SUFFIXES = {"jsonl": (JSONL, JSON), "parquet": ((".parquet", ".pq", ".parq"),), "text": ((),)}
SHOWN_SUFFIXES = 20


class CorpusFiles(NamedTuple):
    """Files in the order in which they are read, and how many others are in the folders, by suffix or reason."""

    files: list[Path]
    left_out: dict[str, int]


def find_files(data: DataSection) -> CorpusFiles:
    """The files of data.paths that data.source reads; none for a source that reads no files itself."""
    return expand_paths(data.paths, SUFFIXES[data.source]) if data.source in SUFFIXES else CorpusFiles([], {})


def expand_paths(paths: Sequence[str], suffixes: Sequence[tuple[str, ...]] = ((),)) -> CorpusFiles:
    """The files of a list of files, folders and globs: each once, sorted within each entry of `paths`.

    Raises UserError for an entry without files, and for a folder that cannot be searched.
    """
    found: dict[str, Path] = {}
    left_out: Counter[str] = Counter()
    for entry in paths:
        path = Path(entry).expanduser()
        if path.is_dir():
            inside = sorted(_files_in(path, entry))
            kinds = {file: _kind(file) for file in inside}
            regular = [file for file in inside if not kinds[file]]
            chosen = next(filter(None, ([f for f in regular if _has(f, group)] for group in suffixes)), [])
            others = Counter(kinds[file] or _suffix(file) for file in {*inside} - {*chosen})
            left_out += others
            listed = ", ".join(f"{count} {name}" for name, count in _ranked(others)[:5])
            wanted = "file" if not suffixes[0] else f"{', '.join(group[0] for group in suffixes)} file"
            what = f"no {wanted} is in this folder" + (f"; it has {listed}" if others else "")
        else:
            matches = sorted([path] if os.path.lexists(path) else map(Path, glob.glob(str(path), recursive=True)))
            chosen = [file for file in matches if not _kind(file)]
            # `**` matches the folders on its way, too.
            others = Counter(kind for kind in map(_kind, matches) if kind and not (kind == "folder" and "**" in entry))
            left_out += others
            what = "this glob matches no file" if glob.has_magic(entry) else "there is no such file or folder"
            if matches and not chosen:
                what = f"this is a {_kind(matches[0])}"
            elif "://" in entry:
                what = "this is an address; only data.source=datasets reads from a network"
        if not chosen:
            raise UserError(
                what,
                where=f"data.paths: {shown(Path(entry))}",
                why="" if path.is_absolute() else f"relative paths start at {Path.cwd()}",
                remedy='give files, folders or globs, for example paths = ["corpus/**/*.txt"]',
            )
        for file in chosen:
            found.setdefault(os.path.realpath(file), file)  # a link to a file that was named is not read again
    counts = dict(_ranked(left_out)[:SHOWN_SUFFIXES])
    if more := left_out.total() - sum(counts.values()):
        counts["others"] = more
    return CorpusFiles(list(found.values()), counts)


def _files_in(folder: Path, entry: str) -> Iterator[Path]:
    """Everything in a folder that is neither a folder nor hidden. Links are followed, a folder is entered once."""

    def refuse(error: OSError) -> None:
        where = f"data.paths: {shown(Path(entry))}"
        what = f"the folder {shown(Path(error.filename))} cannot be searched: {error.strerror}"
        raise UserError(what, where=where, remedy="give yourself the right to read it, or name its files")

    entered: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in files if not name.startswith("."))


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent first, and in one order: a store's hash follows from it."""
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


def _kind(path: Path) -> str:
    """What a path is instead of a regular file; "" for one."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "broken link" if path.is_symlink() else "missing file"
    return "" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "pipe or device, not a regular file"


def _has(path: Path, suffixes: tuple[str, ...]) -> bool:
    return not suffixes or path.name.lower().endswith(suffixes)


def _suffix(path: Path) -> str:
    """The end of a file's name by which it is counted: .csv, .json.lz4, or the whole of a name without a dot."""
    ends = [end.lower() for end in path.suffixes[-2:]]
    return shown(Path("".join(end for end in ends if len(end) <= 8 and not end[1:].isdigit()) or "without a suffix"))
