"""Sources whose documents are texts: the standard library, and text files, whole or cut into documents."""

import os
import platform
import sysconfig
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from minka.data.corpus_files import find_files
from minka.data.document import BadRow, Document
from minka.data.split_text import TextPiece, split_text
from minka.data.text_file import DAMAGE, HEAD_BYTES, damaged_file, is_jsonl, not_utf8, open_text, shown
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


def text_documents(data: DataSection) -> Iterator[Document | BadRow]:
    """A document for each file of data.paths, or for each piece of it (data.split_on, data.chunk_bytes).

    Folders are searched recursively; hidden files are left out. Memory: one document. Raises UserError.
    """
    separated = False
    for path in find_files(data).files:
        piece = None
        try:
            with open_text(path) as stream:
                _refuse_jsonl(path, stream)
                for piece in split_text(stream, data.split_on.encode(), data.chunk_bytes, shown(path)):
                    separated |= piece.separated
                    yield _text_document(path, piece, whole=not (data.split_on or data.chunk_bytes))
        except BadRow as bad:
            yield bad
        except DAMAGE as error:
            raise damaged_file(path, piece.line if piece else 0, error) from None
    if data.split_on and not separated:
        remedy = "take a separator that is in them; in a shell, newlines are written 'data.split_on=\"\\n\\n\"'"
        raise UserError("it is in none of the files", where=f"data.split_on={data.split_on!r}", remedy=remedy)


def _text_document(path: Path, piece: TextPiece, *, whole: bool) -> Document | BadRow:
    name = shown(path)
    try:
        text = piece.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = piece.line + piece.raw.count(b"\n", 0, error.start)
        return not_utf8(f"{name}:{line}", error)
    if whole:
        return Document(text, id=name, source="text", path=name)
    return Document(text, id=f"{name}@{piece.offset}", source="text", path=name, line=piece.line)


def _refuse_jsonl(path: Path, stream: BufferedReader) -> None:
    """Raise BadRow where the documents would be JSON syntax."""
    head = stream.peek(HEAD_BYTES)
    if is_jsonl(path, head[:HEAD_BYTES]):
        what = "this is JSON Lines, whose texts are in its fields"
        raise BadRow("JSON Lines", what, where=shown(path), remedy="it is read with data.source=jsonl")


def read_text(path: Path) -> str:
    """The exact text of a file: no newline is translated, no byte replaced. Raises UserError that names a bad byte."""
    with reading(path):
        raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise not_utf8(f"{path}:{line}", error) from None
