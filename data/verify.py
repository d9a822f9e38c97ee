"""Check a token store against its manifest: hash every file, and compare tokens, index and sidecar with each other."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from minka.data.document import content_hash
from minka.data.store_manifest import SPLITS
from minka.data.token_store import Split, TokenStore
from minka.plan.store_files import MANIFEST, check_store_files, damaged_store, sha256_of

CHUNK = 1 << 22  # tokens checked at once
DECODED = 1_000  # documents of each split whose text is decoded and hashed, evenly spread


def verify(folder: Path, advance: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
    """Check a whole store; returns what was checked. advance: called with the number of bytes hashed.

    Raises UserError that lists the problems.
    """
    store = TokenStore.open(folder)
    problems = list(_file_problems(store, advance))
    checked: dict[str, Any] = {"store": str(folder), "ok": True, "hash": store.hash, "files": len(store.manifest.files)}
    if not problems:
        for name in SPLITS:
            split = store.split(name)
            found = list(_split_problems(split, store)) or list(_text_problems(split, store))
            problems += (f"{name}: {problem}" for problem in found)
            checked[name] = {"documents": split.n_documents, "tokens": split.n_tokens}
    if problems:
        raise damaged_store(folder, *problems)
    return checked


def checked_split(store: TokenStore, name: str, alive: Callable[[], None] = lambda: None) -> Split:
    """Open a split after hashing its files and comparing them with each other. Raises UserError naming the damage.

    It reads the whole split, about two seconds a GB: for validation. `alive` is called for each block.
    """
    check_store_files(store.folder, f"{name}.", alive)
    split = store.split(name)
    problems = [f"{name}: {problem}" for problem in _split_problems(split, store)]
    if problems:
        raise damaged_store(store.folder, *problems)
    return split


def _file_problems(store: TokenStore, advance: Callable[[int], None]) -> Iterator[str]:
    """Sizes are checked already, when the store was opened."""
    folder, files = store.folder, store.manifest.files
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    yield from (f"{name} is not in the manifest" for name in sorted(present - files.keys()))
    for name, file in files.items():
        found = sha256_of(folder / name)
        advance(file.bytes)
        if found != file.sha256:
            yield f"{name} has changed since it was written (sha256 {found[:12]}..)"


def _split_problems(split: Split, store: TokenStore) -> Iterator[str]:
    starts = split.index.pointers // split.tokens.itemsize  # 8 bytes of memory a document, as for the ends
    ends = starts + split.index.lengths
    if starts[0] != 0 or ends[-1] != split.n_tokens or not np.array_equal(starts[1:], ends[:-1]):
        yield "the index does not cover the tokens document by document without gaps"
        return
    if not np.array_equal(split.index.document_index, np.arange(split.n_documents + 1)):
        yield "the index has documents of more than one sequence"
    if split.tokens.dtype.name != store.manifest.dtype:
        yield f"tokens are {split.tokens.dtype.name} where the manifest says {store.manifest.dtype}"
    yield from _token_problems(split, ends, store.manifest.vocab)
    yield from _sidecar_problems(split, store)


def _token_problems(split: Split, ends: NDArray[np.int64], vocab: int) -> Iterator[str]:
    ended = 0
    for start in range(0, split.n_tokens, CHUNK):
        chunk = split.tokens[start : start + CHUNK]
        ended += int(np.count_nonzero(chunk == split.eod))
        beyond = np.flatnonzero((chunk >= vocab) | (chunk < 0))
        if beyond.size:
            at = start + int(beyond[0])
            document = np.searchsorted(ends, at, side="right")
            yield f"token {at} (document {document}) is {split.tokens[at]}, beyond the vocabulary of {vocab}"
            return
    last = split.tokens[ends - 1]
    if ended != split.n_documents or bool((last != split.eod).any()):
        yield f"{ended} end-of-document tokens for {split.n_documents} documents, or not at their ends"


def _sidecar_problems(split: Split, store: TokenStore) -> Iterator[str]:
    table = pq.read_table(store.folder / f"{split.name}.parquet", columns=["bytes", "tokens"])
    if len(table) != split.n_documents:
        yield f"the sidecar has {len(table)} rows for {split.n_documents} documents"
        return
    differ = np.flatnonzero(table["tokens"].to_numpy() != split.index.lengths)
    if differ.size:
        yield f"row {differ[0]} of the sidecar and the index have different numbers of tokens"
    if int(table["bytes"].to_numpy().sum()) != store.manifest.splits[split.name].bytes:
        yield "the sidecar and the manifest have different numbers of bytes"


def _text_problems(split: Split, store: TokenStore) -> Iterator[str]:
    if not store.manifest.exact:
        return
    hashes = pq.read_table(store.folder / f"{split.name}.parquet", columns=["hash"])["hash"]
    for i in np.unique(np.linspace(0, split.n_documents - 1, DECODED).astype(int)):
        if content_hash(split.text_of(int(i)).encode("utf-8")).hex() != hashes[int(i)].as_py():
            yield f"document {i} decodes to a text that differs from the one it was made from"
            return
