"""Documents and where they came from: the sources a corpus is read from, as one iterator."""

import glob
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError

# Tests hold text that is broken on purpose (other encodings, unfinished syntax); the rest is not the library's own.
STDLIB_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, slots=True)
class Document:
    """One text and its provenance. `line` counts from 1 (line of a JSONL file, row of a table); 0 = the whole file."""

    text: str
    id: str
    source: str
    path: str
    url: str = ""
    licence: str = ""
    line: int = 0
    package: str = ""
    version: str = ""


def stdlib_documents() -> Iterator[Document]:
    """The running interpreter's own library, a document a .py file, in sorted order, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in stdlib_names(root):
        yield Document(
            text=read_text(root / name),
            id=f"stdlib:{name}",
            source="stdlib",
            path=name,
            licence="PSF-2.0",
            package="cpython",
            version=platform.python_version(),
        )


def stdlib_names(root: Path) -> list[str]:
    """Paths (posix, relative to `root`) of the .py files that make the library."""
    names = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in STDLIB_LEFT_OUT]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(names)


def text_documents(data: DataSection) -> Iterator[Document]:
    """A document for each file that data.paths means; folders are read whole, without hidden files."""
    for path in expand(data.paths, ()):
        yield Document(text=read_text(path), id=path.as_posix(), source="text", path=path.as_posix())


def read_text(path: Path) -> str:
    """The file's text exactly: no newline is translated, no byte replaced. Raises UserError naming the bad byte."""
    raw = read_bytes(path)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise not_utf8(f"{path}:{line}", error.start, raw[error.start]) from None


def read_bytes(path: Path) -> bytes:
    """The file's bytes. Raises UserError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None


def not_utf8(where: str, offset: int, byte: int) -> UserError:
    """The error for text in another encoding."""
    return UserError(
        f"this is not UTF-8: byte 0x{byte:02x} at byte offset {offset}",
        where=where,
        why="a token must lead back to the exact bytes of its text, so nothing is replaced or skipped",
        remedy="convert the file (iconv -f latin1 -t utf-8), or leave it out with a narrower glob in data.paths",
    )


def expand(paths: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """The files that files, folders and globs mean, each once, sorted within each entry of `paths`.

    suffixes: what a folder is searched for; none = every file that is not hidden. Raises UserError when an entry means
    nothing.
    """
    found: dict[Path, None] = {}
    for entry in paths:
        files = _entry(entry, tuple(suffixes))
        if not files:
            raise _nothing(entry, suffixes)
        found |= dict.fromkeys(files)
    return list(found)


def _entry(entry: str, suffixes: tuple[str, ...]) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_dir():
        below = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        return sorted(p for p in below if p.is_file() and (not suffixes or p.name.endswith(suffixes)))
    if path.is_file():
        return [path]
    return sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())


def _nothing(entry: str, suffixes: Sequence[str]) -> UserError:
    path = Path(entry).expanduser()
    if path.is_dir():
        what = f"no {' or '.join(suffixes) or 'file'} is in this folder"
    elif glob.has_magic(entry):
        what = "this glob matches no file"
    else:
        what = "there is no such file or folder"
    return UserError(
        what,
        where=f"data.paths: {entry}",
        why=f"a corpus was looked for from {Path.cwd()}" if not path.is_absolute() else "",
        remedy='give files, folders or globs, for example paths = ["corpus/**/*.txt"]',
    )
