"""Prepare a token store: survey the corpus, make the tokenizer, write both splits, publish the folder by one rename."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, chdir, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minka.data.corpus_files import find_files
from minka.data.document import Document
from minka.data.indexed_dataset import token_dtype
from minka.data.read_documents import read_documents
from minka.data.round_trip import TextLoss
from minka.data.split_writer import SplitWriter
from minka.data.store_manifest import (
    SPLITS,
    Manifest,
    SplitTotals,
    TokenizerInfo,
    defining_fields,
    hash_file,
    hash_files,
    read_manifest,
    write_manifest,
)
from minka.data.token_store import LOST, LOST_DTYPE, TokenStore
from minka.data.tokenizer import BPE_MIN_ENTRIES, TextTokenizer, bytes_tokenizer, load_hf, train_bpe
from minka.data.validation_split import CorpusSurvey, add_hash, survey_corpus
from minka.plan.atomic import NewFolder, atomic_folder
from minka.plan.config import RunConfig
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError
from minka.plan.read_file import first_line
from minka.plan.run_folder import RunFolder
from minka.plan.store_files import MANIFEST

STORES = "stores"
ENCODE_BYTES = 4 * 2**20  # text tokenized at once
ENCODE_DOCUMENTS = 4_096
TRIED_DOCUMENTS = 4_096  # as many are decoded again, to decide whether the store is exact
# (total or None, what is done, its unit) -> a context that yields advance(n); plan.cli.progress is one.
Progress = Callable[[int | None, str, str], AbstractContextManager[Callable[[int], None]]]


def no_progress(total: int | None, what: str, unit: str) -> AbstractContextManager[Callable[[int], None]]:
    """A Progress that shows nothing."""
    return nullcontext(lambda n: None)


def open_or_prepare(config: RunConfig, root: Path, progress: Progress = no_progress) -> TokenStore:
    """Open the run's token store; prepare it first if it is missing. `root` is the folder that contains stores/.

    Safe in many processes at once: one of them publishes. Raises UserError when the store does not fit the run.
    """
    folder = store_folder(config, root)
    if not (folder / MANIFEST).is_file():
        try:
            base = RunFolder.of(config).bases()[0]
            place = folder if base == Path() else folder.absolute()
            with chdir(base):  # as at the run's first start: the paths of the corpus are relative, in the store too
                prepare(config.data, config.model.vocab, place, progress)
        except UserError:
            if not (folder / MANIFEST).is_file():  # else a different process has published it
                raise
    store = TokenStore.open(folder)
    check_store(store, config)
    return store


def store_folder(config: RunConfig, root: Path) -> Path:
    """The run's store: data.store, or a folder in stores/ named by its definition.

    Both names start at `root`; those of a run that was created, at the folder that it was started in.
    """
    name = Path(config.data.store).expanduser()
    if not config.data.store:
        definition = json.dumps({**defining_fields(config.data), "vocab": config.model.vocab}, sort_keys=True)
        digest = hashlib.sha256(definition.encode()).hexdigest()[:12]
        name = Path(STORES, f"{config.data.source}-{digest}")
    return RunFolder.of(config).find_store(name, root)


def missing_corpus(config: RunConfig, root: Path) -> str:
    """Why the run's store could not be prepared, where it is missing and data.paths names no file; "" otherwise."""
    if (store_folder(config, root) / MANIFEST).is_file():
        return ""
    try:
        find_files(config.data)
    except UserError as error:
        return str(error)
    return ""


def stored_tokens(config: RunConfig) -> int:
    """The training tokens in the run's store; 0 where it is not prepared yet."""
    folder = store_folder(config, Path())
    return read_manifest(folder).splits["train"].tokens if (folder / MANIFEST).is_file() else 0


def check_store(store: TokenStore, config: RunConfig) -> None:
    """Raise UserError unless the store has the tokens that the run describes."""
    manifest, where = store.manifest, str(store.folder)
    remedy = "set data.store to a different store, or leave it empty and the right one is prepared"
    if RunFolder.of(config).exists():
        remedy = f"to prepare it for a new run, name that (run.name=NEW): this is the store of run {config.run.name}"
    name, vocab = manifest.tokenizer.name, config.model.vocab
    if name != config.data.tokenizer:
        what = f"the store was made with tokenizer {name!r}, the run uses {config.data.tokenizer!r}"
        raise UserError(what, where=where, remedy=f"set data.tokenizer={name}; or {remedy}")
    if manifest.vocab > vocab or (manifest.tokenizer.kind != "hf" and manifest.vocab != vocab):
        what = f"the store's vocabulary has {manifest.vocab} entries, the model's embedding {vocab} rows"
        raise UserError(what, where=where, remedy=f"set model.vocab={manifest.vocab}; or {remedy}")
    run = defining_fields(config.data)
    differ = [key for key in run | manifest.source if run.get(key) != manifest.source.get(key)]
    if differ and config.data.source != "stdlib":  # the default: then data.store alone identifies the corpus
        listed = "; ".join(
            f"data.{key} is {manifest.source.get(key)!r}, the run has {run.get(key)!r}" for key in differ
        )
        raise UserError(f"the store was made with different settings: {listed}", where=where, remedy=remedy)


def prepare(data: DataSection, vocab: int, folder: Path, progress: Progress = no_progress) -> None:
    """Make the store `folder`. It appears whole or not at all. Memory does not grow with the corpus.

    vocab: entries of a tokenizer that is trained, and the most that a loaded one may have.
    Raises UserError for unusable input, a full or read-only disk, and a folder that is in the way.
    """
    _check_free(folder)
    if data.tokenizer == "bpe" and vocab < BPE_MIN_ENTRIES:
        raise UserError(
            f"a trained vocabulary has at least {BPE_MIN_ENTRIES} entries: all bytes, and the end of a document",
            where=f"model.vocab={vocab}",
            remedy=f'set model.vocab to {BPE_MIN_ENTRIES} or more, or data.tokenizer="bytes"',
        )
    remedy = "give a different folder with data.store=FOLDER, or read less with data.max_bytes"
    with atomic_folder(folder, remedy=remedy) as new:
        with progress(None, "reading the corpus", "bytes") as advance:
            survey = survey_corpus(data, advance)
        tokenizer = _make_tokenizer(data, vocab, survey.sample, progress)
        tokenizer.save(new.path / "tokenizer")
        with progress(survey.size, "tokenizing", "bytes") as advance:
            splits, without_tokens, loss = _write_splits(data, tokenizer, survey, new, advance)
        manifest = Manifest(
            source=defining_fields(data),
            tokenizer=TokenizerInfo(
                kind=tokenizer.kind,
                name=data.tokenizer,
                entries=tokenizer.entries,
                eod_token=str(tokenizer.backend.id_to_token(tokenizer.eod)),
                sha256=hash_file(new.path / "tokenizer" / "tokenizer.json").sha256,
            ),
            vocab=tokenizer.entries,
            eod=tokenizer.eod,
            dtype=token_dtype(tokenizer.entries).name,
            cutoff=survey.cutoff,
            moved=survey.moved,
            empty=survey.empty + without_tokens,
            skipped=survey.skipped,
            left_out=find_files(data).left_out or None,
            exact=not loss.differ,
            lossy=loss if loss.differ else None,
            added=tokenizer.added or None,
            splits=splits,
            files=hash_files(new.path),
        )
        write_manifest(new.path, manifest)


def _check_free(folder: Path) -> None:
    if (folder / MANIFEST).is_file():
        raise UserError("this token store exists", where=str(folder), remedy="remove it to prepare it again")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        what = "a file has this name" if folder.is_file() else f"this folder is not a token store: no {MANIFEST}"
        raise UserError(what, where=str(folder), remedy="set a different data.store=FOLDER, or move this away")


def _make_tokenizer(data: DataSection, vocab: int, sample: Sequence[bytes], progress: Progress) -> TextTokenizer:
    if data.tokenizer == "bytes":
        return bytes_tokenizer()
    if data.tokenizer != "bpe":
        return load_hf(data.tokenizer, vocab)
    size = sum(map(len, sample))
    with progress(None, f"training a tokenizer of {vocab} entries on {size:,} bytes", "tokenizer") as advance:
        trained = train_bpe(sample, vocab)
        advance(1)
    return trained


def _write_splits(
    data: DataSection, tokenizer: TextTokenizer, survey: CorpusSurvey, new: NewFolder, advance: Callable[[int], None]
) -> tuple[dict[str, SplitTotals], int, TextLoss]:
    """Read the corpus again and write each document to its split.

    Returns the splits, how many documents have no tokens, and what decoding did not give back.
    """
    checksum = without_tokens = 0
    loss, lost_in_validation = TextLoss(), []
    dtype = token_dtype(tokenizer.entries)
    with ExitStack() as stack:
        writers = [stack.enter_context(SplitWriter(new.path, name, dtype, tokenizer.eod)) for name in SPLITS]
        train, validation = writers
        try:
            for document, tokens in _tokenize(data, tokenizer):
                checksum = add_hash(checksum, document.hash)
                writer, lost = (validation if document.split_key < survey.cutoff else train), 0
                if loss.tried < TRIED_DOCUMENTS or (writer is validation and tokenizer.kind == "hf"):
                    loss, lost = loss.after(tokenizer, tokens, document.text, len(document.raw))
                if len(tokens):
                    writer.add(document, tokens)
                    lost_in_validation += [lost] * (writer is validation)
                else:
                    without_tokens += 1
                advance(len(document.raw))
        finally:
            new.done = (train.bytes + validation.bytes) / survey.size
        if checksum != survey.checksum:
            what, remedy = "the corpus changed between its two readings", "prepare it again when nothing writes to it"
            raise UserError(what, where=f"data.source={data.source}", remedy=remedy)
        for writer in writers:
            if not writer.documents:
                what = f"the tokenizer makes no token of the {writer.name} split's documents"
                raise UserError(what, where=f"data.tokenizer={data.tokenizer}", remedy="give more text")
        if loss.differ:
            np.array(lost_in_validation, dtype=LOST_DTYPE).tofile(new.path / f"{validation.name}{LOST}")
        return {writer.name: writer.finish() for writer in writers}, without_tokens, loss


def _tokenize(data: DataSection, tokenizer: TextTokenizer) -> Iterator[tuple[Document, NDArray[Any]]]:
    """Every document with text and its tokens. Documents are tokenized in groups, on all cores."""
    group: list[Document] = []
    size = 0
    for document in read_documents(data):
        if document.raw:
            group.append(document)
            size += len(document.raw)
        if size >= ENCODE_BYTES or len(group) >= ENCODE_DOCUMENTS:
            yield from zip(group, _encode(tokenizer, group), strict=True)
            group, size = [], 0
    yield from zip(group, _encode(tokenizer, group), strict=True)


def _encode(tokenizer: TextTokenizer, group: Sequence[Document]) -> list[NDArray[Any]]:
    try:
        return tokenizer.encode([document.text for document in group])
    except Exception as error:  # the Rust code raises plain Exception
        if len(group) > 1:
            return [tokens for document in group for tokens in _encode(tokenizer, [document])]
        why = "its vocabulary has gaps, and neither an unknown token nor bytes to fall back to"
        what = f"the tokenizer cannot encode this document: {first_line(error)}"
        raise UserError(what, where=group[0].id, why=why, remedy="use a different data.tokenizer") from None
