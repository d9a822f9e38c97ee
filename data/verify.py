"""Is a store what its manifest says? Every file hashed again, and tokens, index and sidecar held against each other."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from minka.data.corpus_split import content_hash
from minka.data.store_manifest import MANIFEST, SPLITS, hash_file, read_manifest
from minka.data.token_store import Split, TokenStore
from minka.plan.errors import UserError

BLOCK = 1 << 22  # tokens looked at at once
DECODED = 1_000  # documents of each split whose text is decoded and hashed, evenly spread
SHOWN = 5


def verify(folder: Path, advance: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
    """Check all of a store; returns what was checked. advance: called with the bytes hashed.

    Raises UserError naming what is wrong.
    """
    problems = list(_files(folder, advance))
    if problems:
        raise _damaged(folder, problems)
    store = TokenStore.open(folder)
    checked: dict[str, Any] = {"store": str(folder), "ok": True, "hash": store.hash, "files": len(store.manifest.files)}
    for name in SPLITS:
        split = store.split(name)
        problems = [f"{name}: {problem}" for problem in _split(split, store)]
        if problems:
            raise _damaged(folder, problems)
        checked[name] = {"documents": split.n_documents, "tokens": split.n_tokens}
    return checked


def _files(folder: Path, advance: Callable[[int], None]) -> Iterator[str]:
    manifest = read_manifest(folder)
    known = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    yield from (f"{name} is not in the manifest" for name in sorted(known - manifest.files.keys()))
    for name, file in manifest.files.items():
        if name not in known:
            yield f"{name} is missing"
            continue
        found = hash_file(folder / name)
        advance(found.bytes)
        if found.bytes != file.bytes:
            yield f"{name} has {found.bytes} bytes where the manifest says {file.bytes}"
        elif found.sha256 != file.sha256:
            yield f"{name} has another content than when it was written (sha256 {found.sha256[:12]}..)"


def _split(split: Split, store: TokenStore) -> Iterator[str]:
    starts, ends, lengths = split.document_starts, split.document_ends, split.index.lengths
    if starts[0] != 0 or ends[-1] != split.n_tokens or not np.array_equal(starts[1:], ends[:-1]):
        yield "the index does not cover the tokens one document after the other"
        return
    if not np.array_equal(split.index.document_index, np.arange(split.n_documents + 1)):
        yield "the index's documents are not its sequences one by one"
    if split.tokens.dtype.name != store.manifest.dtype:
        yield f"tokens are {split.tokens.dtype.name} where the manifest says {store.manifest.dtype}"
    yield from _tokens(split, store.manifest.vocab)
    yield from _sidecar(split, lengths, store)


def _tokens(split: Split, vocab: int) -> Iterator[str]:
    ended = 0
    for start in range(0, split.n_tokens, BLOCK):
        block = split.tokens[start : start + BLOCK]
        ended += int(np.count_nonzero(block == split.eod))
        beyond = np.flatnonzero((block >= vocab) | (block < 0))
        if beyond.size:
            at = start + int(beyond[0])
            document = split.spans(at, at + 1)[0].document
            yield f"token {at} (document {document}) is {split.tokens[at]}, beyond the vocabulary of {vocab}"
            return
    last = split.tokens[split.document_ends - 1]
    if ended != split.n_documents or bool((last != split.eod).any()):
        yield f"{ended} end-of-document tokens for {split.n_documents} documents, or not at their ends"


def _sidecar(split: Split, lengths: Any, store: TokenStore) -> Iterator[str]:
    table = pq.read_table(store.folder / f"{split.name}.parquet", columns=["bytes", "tokens", "hash"])
    if len(table) != split.n_documents:
        yield f"the sidecar has {len(table)} rows for {split.n_documents} documents"
        return
    differ = np.flatnonzero(table["tokens"].to_numpy() != lengths)
    if differ.size:
        yield f"the sidecar's row {differ[0]} has another number of tokens than the index"
    if int(table["bytes"].to_numpy().sum()) != store.manifest.splits[split.name].bytes:
        yield "the sidecar's bytes are not the manifest's"
    if not store.manifest.exact:
        return
    hashes = table["hash"]
    for i in np.unique(np.linspace(0, split.n_documents - 1, DECODED).astype(int)):
        if content_hash(split.text_of(int(i)).encode("utf-8")).hex() != hashes[int(i)].as_py():
            yield f"document {i} decodes to another text than it was made from"
            return


def _damaged(folder: Path, problems: list[str]) -> UserError:
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return UserError(
        f"the store is damaged: {'; '.join(problems[:SHOWN])}{more}",
        where=str(folder),
        remedy="copy it again from where it is whole, or remove the folder and `minka data prepare` it again",
    )
