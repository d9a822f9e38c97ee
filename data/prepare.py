"""From documents to a token store: survey the corpus, make the tokenizer, write both splits, publish by one rename."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from minka.data.building import Work, building
from minka.data.corpus_split import Item, Survey, add_hash, read_corpus, survey
from minka.data.indexed_dataset import token_dtype
from minka.data.split_writer import SplitWriter
from minka.data.store_manifest import (
    MANIFEST,
    SPLITS,
    Manifest,
    SplitPart,
    TokenizerPart,
    describe,
    hash_files,
    write_manifest,
)
from minka.data.token_store import TokenStore
from minka.data.tokenizer import (
    TextTokenizer,
    bytes_tokenizer,
    check_bpe_vocab,
    load_hf,
    tokenizer_hash,
    train_bpe,
)
from minka.plan.config import RunConfig
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError

STORES = "stores"
ENCODE_BYTES = 4 * 2**20  # text tokenized at once
ENCODE_DOCUMENTS = 4_096
# (total or None, what is done, its unit) -> a context that yields advance(n); plan.cli.progress is one.
Progress = Callable[[int | None, str, str], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def silent(total: int | None, what: str, unit: str) -> Iterator[Callable[[int], None]]:
    """A Progress that shows nothing."""
    yield lambda n: None


def open_or_prepare(config: RunConfig, root: Path, progress: Progress = silent) -> TokenStore:
    """The run's token store, prepared first where it is missing. `root` is the folder that holds stores/.

    Safe in many processes at once: one of them wins. Raises UserError when the store is not the one the run describes.
    """
    folder = store_folder(config, root)
    if not (folder / MANIFEST).is_file():
        try:
            prepare(config.data, config.model.vocab, folder, progress)
        except UserError:
            if not (folder / MANIFEST).is_file():  # else somebody was faster, and theirs will do
                raise
    store = TokenStore.open(folder)
    check_store(store, config)
    return store


def store_folder(config: RunConfig, root: Path) -> Path:
    """The run's store: data.store (below `root` unless absolute), else one in stores/ named by its definition."""
    if config.data.store:
        return root / Path(config.data.store).expanduser()
    defining = json.dumps({**describe(config.data), "vocab": config.model.vocab}, sort_keys=True)
    digest = hashlib.sha256(defining.encode()).hexdigest()[:12]
    return root / STORES / f"{config.data.source}-{digest}"


def check_store(store: TokenStore, config: RunConfig) -> None:
    """Refuse a store whose tokens are not the run's. Raises UserError."""
    manifest, where = store.manifest, str(store.folder)
    remedy = "name another store with data.store, or leave data.store empty and the right one is prepared"
    wanted, vocab = config.data.tokenizer, config.model.vocab
    if manifest.tokenizer.name != wanted:
        raise UserError(
            f"the store was made with tokenizer {manifest.tokenizer.name!r}, the run asks for {wanted!r}",
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
    given = describe(config.data)
    differ = [key for key in given if given[key] != manifest.source.get(key)]
    if differ and config.data.source != "stdlib":  # the default: then data.store alone says what is meant
        lines = "; ".join(f"data.{key} is {given[key]!r} here and {manifest.source.get(key)!r} there" for key in differ)
        raise UserError(f"the store was made from something else: {lines}", where=where, remedy=remedy)


def prepare(data: DataSection, vocab: int, folder: Path, progress: Progress = silent) -> None:
    """Make the store `folder`: it is there whole, or not at all. Memory does not grow with the corpus.

    vocab: entries of a tokenizer that is trained, and the most that one which is loaded may have.
    Raises UserError for input that cannot be used, a disk that is full or may not be written, and a folder in the way.
    """
    _check_free(folder)
    if data.tokenizer == "bpe":
        check_bpe_vocab(vocab)
    with building(folder) as work:
        with progress(None, "reading the corpus", "bytes") as advance:
            surveyed = survey(data, advance)
        tokenizer = _tokenizer(data, vocab, surveyed, progress)
        tokenizer.save(work.folder / "tokenizer")
        with progress(surveyed.size, "tokenizing", "bytes") as advance:
            written = _Written(data, tokenizer, surveyed, work, advance)
            written.run()
        write_manifest(work.folder, _manifest(data, tokenizer, surveyed, written, work.folder))


def _check_free(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if (folder / MANIFEST).is_file():
        raise UserError("a token store is there already", where=str(folder), remedy="remove it to prepare it anew")
    raise UserError(
        "this folder is there and is no token store" if folder.is_dir() else "a file of this name is in the way",
        where=str(folder),
        why="it has no manifest.json, and nothing of somebody else's is written over",
        remedy="give another folder with data.store=FOLDER, or move what is there",
    )


def _tokenizer(data: DataSection, vocab: int, surveyed: Survey, progress: Progress) -> TextTokenizer:
    if data.tokenizer == "bytes":
        return bytes_tokenizer()
    if data.tokenizer == "bpe":
        size = sum(map(len, surveyed.sample))
        with progress(None, f"training a tokenizer of {vocab} entries on {size:,} bytes", "tokenizer") as advance:
            trained = train_bpe(surveyed.sample, vocab, size)
            advance(1)
        return trained
    return load_hf(data.tokenizer, vocab)


class _Written:
    """The second reading: each document to its side, tokenized in groups."""

    def __init__(
        self, data: DataSection, tokenizer: TextTokenizer, surveyed: Survey, work: Work, advance: Callable[[int], None]
    ) -> None:
        self.data, self.tokenizer, self.surveyed, self.work, self.advance = data, tokenizer, surveyed, work, advance
        self.dtype = token_dtype(tokenizer.entries)
        self.parts: dict[str, SplitPart] = {}
        self.without_tokens = self.tried = 0
        self.exact = True
        work.total = surveyed.size

    def run(self) -> None:
        checksum = 0
        with ExitStack() as stack:
            writers = [SplitWriter(self.work.folder, name, self.dtype, self.tokenizer.eod) for name in SPLITS]
            train, validation = (stack.enter_context(writer) for writer in writers)
            for group in groups(read_corpus(self.data)):
                for item in group:
                    checksum = add_hash(checksum, item.hash)
                for writer, validates in ((train, False), (validation, True)):
                    self._write(writer, [item for item in group if (item.key < self.surveyed.cutoff) == validates])
            self._check_same(checksum)
            for writer in writers:
                if not writer.documents:
                    raise self._no_tokens(writer.name)
                self.parts[writer.name] = writer.finish()

    def _write(self, writer: SplitWriter, items: list[Item]) -> None:
        encoded = self.tokenizer.encode([item.document.text for item in items])
        kept = [(item, tokens) for item, tokens in zip(items, encoded, strict=True) if len(tokens)]
        self.without_tokens += len(items) - len(kept)
        for item, tokens in kept[: max(0, ENCODE_DOCUMENTS - self.tried)]:
            self.tried += 1
            self.exact = self.exact and self.tokenizer.decode(tokens) == item.document.text
        writer.add([item for item, _ in kept], [tokens for _, tokens in kept], self.work.advance)
        self.advance(sum(len(item.raw) for item in items))

    def _check_same(self, checksum: int) -> None:
        if checksum != self.surveyed.checksum:
            raise UserError(
                "the corpus changed while it was being read",
                where=f"data.source={self.data.source}",
                why="it is read twice, first to split it and train the tokenizer, and the two readings differ",
                remedy="prepare it again when nothing writes to it",
            )

    def _no_tokens(self, name: str) -> UserError:
        return UserError(
            f"the tokenizer makes no token of the {name} split's documents",
            where=f"data.tokenizer={self.data.tokenizer}",
            remedy="give more text, or another tokenizer",
        )


def groups(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Documents with text, in groups that are tokenized at once."""
    group: list[Item] = []
    size = 0
    for item in items:
        if not item.raw:
            continue
        group.append(item)
        size += len(item.raw)
        if size >= ENCODE_BYTES or len(group) >= ENCODE_DOCUMENTS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _manifest(
    data: DataSection, tokenizer: TextTokenizer, surveyed: Survey, written: _Written, folder: Path
) -> Manifest:
    return Manifest(
        source=describe(data),
        tokenizer=TokenizerPart(
            kind=tokenizer.kind,
            name=data.tokenizer,
            entries=tokenizer.entries,
            eod_token=str(tokenizer.backend.id_to_token(tokenizer.eod)),
            sha256=tokenizer_hash(folder / "tokenizer"),
        ),
        vocab=tokenizer.entries,
        eod=tokenizer.eod,
        dtype=written.dtype.name,
        cutoff=surveyed.cutoff,
        moved=surveyed.moved,
        empty=surveyed.empty + written.without_tokens,
        exact=written.exact,
        splits=written.parts,
        files=hash_files(folder),
    )
