"""Prepare a token store: survey the corpus, make the tokenizer, write both splits, publish the folder by one rename."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from minka.data.document import HashedDocument
from minka.data.indexed_dataset import token_dtype
from minka.data.read_documents import read_documents
from minka.data.split_writer import SplitWriter
from minka.data.store_manifest import (
    MANIFEST,
    SPLITS,
    Manifest,
    SplitTotals,
    TokenizerInfo,
    defining_fields,
    hash_file,
    hash_files,
    write_manifest,
)
from minka.data.token_store import TokenStore
from minka.data.tokenizer import TextTokenizer, bytes_tokenizer, check_bpe_vocab, load_hf, train_bpe
from minka.data.validation_split import CorpusSurvey, add_hash, survey_corpus
from minka.plan.atomic import NewFolder, atomic_folder
from minka.plan.config import RunConfig
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError

STORES = "stores"
ENCODE_BYTES = 4 * 2**20  # text tokenized at once
ENCODE_DOCUMENTS = 4_096
# (total or None, what is done, its unit) -> a context that yields advance(n); plan.cli.progress is one.
Progress = Callable[[int | None, str, str], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def no_progress(total: int | None, what: str, unit: str) -> Iterator[Callable[[int], None]]:
    """A Progress that shows nothing."""
    yield lambda n: None


def open_or_prepare(config: RunConfig, root: Path, progress: Progress = no_progress) -> TokenStore:
    """Open the run's token store; prepare it first if it is missing. `root` is the folder that contains stores/.

    Safe in many processes at once: one of them publishes. Raises UserError when the store does not fit the run.
    """
    folder = store_folder(config, root)
    if not (folder / MANIFEST).is_file():
        try:
            prepare(config.data, config.model.vocab, folder, progress)
        except UserError:
            if not (folder / MANIFEST).is_file():  # else a different process has published it
                raise
    store = TokenStore.open(folder)
    check_store(store, config)
    return store


def store_folder(config: RunConfig, root: Path) -> Path:
    """The run's store: data.store (below `root` unless absolute), or a folder in stores/ named by its definition."""
    if config.data.store:
        return root / Path(config.data.store).expanduser()
    definition = json.dumps({**defining_fields(config.data), "vocab": config.model.vocab}, sort_keys=True)
    digest = hashlib.sha256(definition.encode()).hexdigest()[:12]
    return root / STORES / f"{config.data.source}-{digest}"


def check_store(store: TokenStore, config: RunConfig) -> None:
    """Raise UserError unless the store has the tokens that the run describes."""
    manifest, where = store.manifest, str(store.folder)
    remedy = "set data.store to a different store, or leave it empty and the right one is prepared"
    wanted, vocab = config.data.tokenizer, config.model.vocab
    if manifest.tokenizer.name != wanted:
        raise UserError(
            f"the store was made with tokenizer {manifest.tokenizer.name!r}, the run uses {wanted!r}",
            where=where,
            remedy=f"set data.tokenizer={manifest.tokenizer.name}; or {remedy}",
        )
    if manifest.vocab > vocab or (manifest.tokenizer.kind != "hf" and manifest.vocab != vocab):
        raise UserError(
            f"the store's vocabulary has {manifest.vocab} entries, the model's embedding {vocab} rows",
            where=where,
            why="a token id beyond the embedding has no row" if manifest.vocab > vocab else "",
            remedy=f"set model.vocab={manifest.vocab}; or {remedy}",
        )
    run = defining_fields(config.data)
    differ = [key for key in run if run[key] != manifest.source.get(key)]
    if differ and config.data.source != "stdlib":  # the default: then data.store alone identifies the corpus
        listed = "; ".join(f"data.{key} is {manifest.source.get(key)!r}, the run has {run[key]!r}" for key in differ)
        raise UserError(f"the store was made with different settings: {listed}", where=where, remedy=remedy)


def prepare(data: DataSection, vocab: int, folder: Path, progress: Progress = no_progress) -> None:
    """Make the store `folder`. It appears whole or not at all. Memory does not grow with the corpus.

    vocab: entries of a tokenizer that is trained, and the most that a loaded one may have.
    Raises UserError for unusable input, a full or read-only disk, and a folder that is in the way.
    """
    _check_free(folder)
    if data.tokenizer == "bpe":
        check_bpe_vocab(vocab)
    remedy = "give a different folder with data.store=FOLDER, or read less with data.max_bytes"
    with atomic_folder(folder, remedy=remedy) as new:
        with progress(None, "reading the corpus", "bytes") as advance:
            survey = survey_corpus(data, advance)
        tokenizer = _make_tokenizer(data, vocab, survey, progress)
        tokenizer.save(new.path / "tokenizer")
        with progress(survey.size, "tokenizing", "bytes") as advance:
            second = _SecondReading(data, tokenizer, survey, new, advance)
            splits = second.write_splits()
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
            empty=survey.empty + second.without_tokens,
            exact=second.exact,
            splits=splits,
            files=hash_files(new.path),
        )
        write_manifest(new.path, manifest)


def _check_free(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if (folder / MANIFEST).is_file():
        raise UserError("this token store exists", where=str(folder), remedy="remove it to prepare it again")
    raise UserError(
        "this folder exists and is not a token store" if folder.is_dir() else "a file has this name",
        where=str(folder),
        why="minka overwrites only its own files" + (", and manifest.json is missing" if folder.is_dir() else ""),
        remedy="give a different folder with data.store=FOLDER, or move this one",
    )


def _make_tokenizer(data: DataSection, vocab: int, survey: CorpusSurvey, progress: Progress) -> TextTokenizer:
    if data.tokenizer == "bytes":
        return bytes_tokenizer()
    if data.tokenizer != "bpe":
        return load_hf(data.tokenizer, vocab)
    size = sum(map(len, survey.sample))
    with progress(None, f"training a tokenizer of {vocab} entries on {size:,} bytes", "tokenizer") as advance:
        trained = train_bpe(survey.sample, vocab, size)
        advance(1)
    return trained


@dataclass
class _SecondReading:
    """Reads the corpus again, tokenizes it in groups of documents, and writes each document to its split."""

    data: DataSection
    tokenizer: TextTokenizer
    survey: CorpusSurvey
    new: NewFolder
    advance: Callable[[int], None]
    without_tokens: int = 0
    tried: int = 0  # documents that were decoded again, to decide `exact`
    exact: bool = True

    def write_splits(self) -> dict[str, SplitTotals]:
        checksum = 0
        dtype = token_dtype(self.tokenizer.entries)
        with ExitStack() as stack:
            writers = [SplitWriter(self.new.path, name, dtype, self.tokenizer.eod) for name in SPLITS]
            for writer in writers:
                stack.enter_context(writer)
            try:
                for group in group_documents(read_documents(self.data)):
                    for document in group:
                        checksum = add_hash(checksum, document.hash)
                    validation = [document for document in group if document.split_key < self.survey.cutoff]
                    train = [document for document in group if document.split_key >= self.survey.cutoff]
                    for writer, documents in zip(writers, (train, validation), strict=True):
                        self._write(writer, documents)
            finally:
                self.new.done = sum(writer.bytes for writer in writers) / self.survey.size
            self._check_same(checksum)
            return {writer.name: self._finish(writer) for writer in writers}

    def _write(self, writer: SplitWriter, documents: list[HashedDocument]) -> None:
        encoded = self.tokenizer.encode([hashed.document.text for hashed in documents])
        kept = [(hashed, tokens) for hashed, tokens in zip(documents, encoded, strict=True) if len(tokens)]
        self.without_tokens += len(documents) - len(kept)
        for hashed, tokens in kept[: max(0, ENCODE_DOCUMENTS - self.tried)]:
            self.tried += 1
            self.exact = self.exact and self.tokenizer.decode(tokens) == hashed.document.text
        writer.add(kept)
        self.advance(sum(len(hashed.raw) for hashed in documents))

    def _check_same(self, checksum: int) -> None:
        if checksum != self.survey.checksum:
            raise UserError(
                "the corpus changed while it was being read",
                where=f"data.source={self.data.source}",
                why="it is read twice, first to split it and train the tokenizer, and the two readings differ",
                remedy="prepare it again when nothing writes to it",
            )

    def _finish(self, writer: SplitWriter) -> SplitTotals:
        if not writer.documents:
            raise UserError(
                f"the tokenizer makes no token of the {writer.name} split's documents",
                where=f"data.tokenizer={self.data.tokenizer}",
                remedy="give more text, or a different tokenizer",
            )
        return writer.finish()


def group_documents(documents: Iterator[HashedDocument]) -> Iterator[list[HashedDocument]]:
    """Documents with text, in groups that are tokenized at once."""
    group: list[HashedDocument] = []
    size = 0
    for document in documents:
        if not document.raw:
            continue
        group.append(document)
        size += len(document.raw)
        if size >= ENCODE_BYTES or len(group) >= ENCODE_DOCUMENTS:
            yield group
            group, size = [], 0
    if group:
        yield group
