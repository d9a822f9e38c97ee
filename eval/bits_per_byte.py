"""Bits per byte on held-out documents: what a compressor driven by the model would write, over what it would read.

Every byte of a document counts. The first token has no context and is charged ln(vocab). The end-of-document token
is charged what the model predicts and counts no byte. Losses are summed by document, in fp64, over all ranks. What the
tokenizer loses is not charged: `unaccounted` says how much that is.
"""

import lzma
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from minka.data.token_store import Split
from minka.eval.scoring_windows import pack_windows, padding_batch, scoring_windows
from minka.parallel.engine import Scorer
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig
from minka.plan.scores import BITS_PER_BYTE

MAX_SOURCES, REST = 50, "(other sources)"  # scores by source at most, and the name of the last where there are more
MAX_BYTES = 64 * 2**20  # xz -9 takes about a second a megabyte


class Scores(NamedTuple):
    """The result of an evaluation."""

    scores: dict[str, float]  # by name: bits_per_byte and bits_per_byte/SOURCE
    stderr: dict[str, float]
    documents: int
    bytes: int
    document_tokens: int
    settings: dict[str, int]  # all that the numbers depend on besides the weights and the data
    unaccounted: dict[str, float]  # by score, the share of bytes that the tokenizer lost; no entry: none; NaN: unknown


def bits_per_byte(
    scorer: Scorer, split: Split, config: RunConfig, mesh: Mesh, eod: int, heartbeat: Callable[[], None]
) -> Scores:
    """Score the first eval.max_documents documents of `split` (0 = all). Collective; equal on every rank.

    Windows of data.seq_len overlap by half, so that a target has at least half a window of context, if there is that.
    """
    count = min(config.eval.max_documents or split.n_documents, split.n_documents)
    length, rows = config.data.seq_len, config.eval.batch_sequences
    stride = max(1, length // 2)
    windows = (w for i in range(count) for w in scoring_windows(i, np.asarray(split.document(i)), length, stride))
    share = islice(windows, mesh.data_rank, None, mesh.layout.data_ways)
    batches = pack_windows(share, length, rows, padding=eod)
    nats = torch.zeros(count, dtype=torch.float64, device=mesh.device)
    while True:  # every rank scores as many batches as the rank with most: a forward pass is collective
        mine = next(batches, None)
        if not mesh.sum_on_host([mine is not None])[0]:
            break
        batch = mine or padding_batch(length, rows, padding=eod)
        losses = scorer.token_losses(scorer.prepare(batch))
        owners = batch.owners.clamp(min=0).flatten().to(mesh.device)  # positions without an owner have a loss of 0
        nats.index_add_(0, owners, losses.flatten().double())
        heartbeat()
    mesh.sum_(nats)
    bits = (nats.cpu().numpy() + math.log(config.model.vocab)) / math.log(2)
    sizes, lost = split.document_bytes[:count].astype(np.float64), split.lost_bytes[:count]
    tokens = int(split.index.lengths[:count].sum())
    sources = named_sources([split.source_of(i) for i in range(count)], sizes)
    scores, stderr, shares = {}, {}, {}
    of_source = {f"{BITS_PER_BYTE}/{source}": sources == source for source in sorted(set(sources))}
    for name, chosen in {BITS_PER_BYTE: np.ones(count, bool), **of_source}.items():
        scores[name], stderr[name] = ratio_of_sums(bits[chosen], sizes[chosen])
        shares[name] = float(lost[chosen].sum() / sizes[chosen].sum())
    settings = {"max_documents": config.eval.max_documents, "window": length, "stride": stride}
    unaccounted = {name: share for name, share in shares.items() if share}
    return Scores(scores, stderr, count, int(sizes.sum()), tokens, settings, unaccounted)


def named_sources(sources: Sequence[str], sizes: np.ndarray) -> np.ndarray:
    """The source of each document, with the smallest (by bytes) under one name where there are more than MAX_SOURCES.

    A source that is a URL, or a file, would make a score of each document. A source called REST is one of the rest.
    """
    total: Counter[str] = Counter()
    for source, size in zip(sources, sizes, strict=True):
        total[source] += int(size)
    if len(total) <= MAX_SOURCES:
        return np.array(sources)
    by_size = sorted(total.keys() - {REST}, key=lambda source: (-total[source], source))
    largest = set(by_size[: MAX_SOURCES - 1])
    return np.array([source if source in largest else REST for source in sources])


def ratio_of_sums(bits: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Return sum(bits) / sum(sizes) and its standard error over documents, NaN for one (Cochran 1977, section 2.11)."""
    ratio = float(bits.sum() / sizes.sum())
    if len(bits) < 2:
        return ratio, math.nan
    residual = bits - ratio * sizes
    return ratio, float(math.sqrt(residual.var(ddof=1) / len(bits)) / sizes.mean())


def compressed_bits_per_byte(documents: Iterable[bytes]) -> dict[str, float]:
    """Return the baseline that needs no model: 8 * compressed / plain bytes of held-out documents.

    `zlib -9` starts from nothing at each document. `xz -9` of all documents in one piece sees the other documents, as
    a model sees its training data. Empty if there are no bytes, or more than MAX_BYTES.
    """
    documents = [d for d in documents if d]
    plain = sum(map(len, documents))
    if not plain or plain > MAX_BYTES:
        return {}
    separate = sum(len(zlib.compress(d, 9)) for d in documents)
    together = len(lzma.compress(b"".join(documents), preset=9))
    return {"zlib -9, each document": 8 * separate / plain, "xz -9, all in one": 8 * together / plain}
