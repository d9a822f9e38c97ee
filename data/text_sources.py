"""Sources whose documents are text files: the standard library, and the files, folders and globs of data.paths."""

import glob
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from minka.data.document import Document
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError
from minka.plan.read_file import reading

# Tests contain text that is broken on purpose (other encodings, unfinished syntax); the rest is not the library's own.
STDLIB_EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def stdlib_documents(_: DataSection) -> Iterator[Document]:
    """A document for each .py file of the running interpreter's own library, in sorted order, without its tests."""
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
    """Paths (posix, relative to `root`) of the library's .py files."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in STDLIB_EXCLUDED]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(names)


def text_documents(data: DataSection) -> Iterator[Document]:
    """A document for each file of data.paths. Folders are searched recursively; hidden files are left out."""
    for path in expand_paths(data.paths, ()):
        yield Document(text=read_text(path), id=path.as_posix(), source="text", path=path.as_posix())


def read_text(path: Path) -> str:
    """The exact text of a file: no newline is translated, no byte replaced. Raises UserError that names a bad byte."""
    with reading(path):
        raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise not_utf8(f"{path}:{line}", error) from None


def not_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    """The error for text in a different encoding."""
    what = f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte offset {error.start}"
    remedy = "convert the file (iconv -f latin1 -t utf-8), or exclude it with a narrower glob in data.paths"
    return UserError(what, where=where, why="no byte of a text is replaced or skipped", remedy=remedy)


def expand_paths(paths: Sequence[str], suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a list of files, folders and globs: each once, sorted within each entry of `paths`.

    suffixes: of the files that a folder is searched for; () = every file that is not hidden.
    Raises UserError for an entry without files.
    """
    found: dict[Path, None] = {}
    for entry in paths:
        path = Path(entry).expanduser()
        if path.is_dir():
            visible = (p for p in path.rglob("*") if not any(s.startswith(".") for s in p.relative_to(path).parts))
            files = sorted(p for p in visible if p.is_file() and (not suffixes or p.name.endswith(suffixes)))
            what = f"no {' or '.join(suffixes) or 'file'} is in this folder"
        else:
            matches = [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True))
            files = sorted(p for p in matches if p.is_file())
            what = "this glob matches no file" if glob.has_magic(entry) else "there is no such file or folder"
        if not files:
            raise UserError(
                what,
                where=f"data.paths: {entry}",
                why="" if path.is_absolute() else f"relative paths start at {Path.cwd()}",
                remedy='give files, folders or globs, for example paths = ["corpus/**/*.txt"]',
            )
        found |= dict.fromkeys(files)
    return list(found)
