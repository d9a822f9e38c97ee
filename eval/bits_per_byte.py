"""Bits per byte on held-out documents: what a compressor driven by the model would write, over what it would read.

Every byte of a document counts. The first token has no context and is charged ln(vocab). The end-of-document token
is charged what the model predicts and counts no byte. Losses are summed by document, in fp64, over all ranks.
"""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from minka.data.token_store import Split
from minka.eval.scoring_windows import ScoringBatch, pack_windows, padding_batch, scoring_windows
from minka.parallel.engine import Scorer
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig


class Scores(NamedTuple):
    """`scores` and `stderr` are by name: bits_per_byte and bits_per_byte/SOURCE.

    `settings` holds all that the numbers depend on besides the weights and the data.
    """

    scores: dict[str, float]
    stderr: dict[str, float]
    documents: int
    bytes: int
    document_tokens: int
    settings: dict[str, int]


def bits_per_byte(
    scorer: Scorer, split: Split, config: RunConfig, mesh: Mesh, eod: int, heartbeat: Callable[[], None]
) -> Scores:
    """Score the first eval.max_documents documents of `split` (0 = all). Collective; equal on every rank.

    Windows of data.seq_len overlap by half: a target has at least half a sequence of context, where the document has
    that much.
    """
    count = min(config.eval.max_documents or split.n_documents, split.n_documents)
    length = config.data.seq_len
    stride = max(1, length // 2)
    nats = torch.zeros(count, dtype=torch.float64, device=mesh.device)
    for batch in _batches_of_this_rank(split, count, config, mesh, eod, stride):
        losses = scorer.token_losses(scorer.prepare(batch))
        owners = batch.owners.clamp(min=0).flatten().to(mesh.device)  # positions without an owner have a loss of 0
        nats.index_add_(0, owners, losses.flatten().double())
        heartbeat()
    mesh.sum_(nats)
    bits = (nats.cpu().numpy() + math.log(config.model.vocab)) / math.log(2)
    sizes = split.document_bytes[:count].astype(np.float64)
    tokens = sum(len(split.document(i)) for i in range(count))
    sources = np.array([split.source_of(i) for i in range(count)])
    scores, stderr = {}, {}
    for name, chosen in [("", np.ones(count, bool))] + [(f"/{s}", sources == s) for s in sorted(set(sources))]:
        ratio, error = ratio_of_sums(bits[chosen], sizes[chosen])
        scores["bits_per_byte" + name], stderr["bits_per_byte" + name] = ratio, error
    settings = {"max_documents": config.eval.max_documents, "window": length, "stride": stride}
    return Scores(scores, stderr, count, int(sizes.sum()), tokens, settings)


def ratio_of_sums(bits: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Return sum(bits) / sum(sizes) and its standard error over documents, NaN for one (Cochran 1977, section 2.11)."""
    ratio = bits.sum() / sizes.sum()
    if len(bits) < 2:
        return float(ratio), math.nan
    residual = bits - ratio * sizes
    error = math.sqrt(residual.var(ddof=1) / len(bits)) / sizes.mean()
    return float(ratio), float(error)


def _batches_of_this_rank(
    split: Split, count: int, config: RunConfig, mesh: Mesh, eod: int, stride: int
) -> Iterator[ScoringBatch]:
    """Yield this rank's share of the windows. Every rank yields as many batches as the rank with most."""
    length, batch = config.data.seq_len, config.eval.batch_sequences
    windows = (w for i in range(count) for w in scoring_windows(i, np.asarray(split.document(i)), length, stride))
    share = islice(windows, mesh.data_rank, None, mesh.layout.data_ways)
    batches = pack_windows(share, length, batch, padding=eod)
    while True:
        mine = next(batches, None)
        if not mesh.sum_on_host([mine is not None])[0]:
            return
        yield mine if mine is not None else padding_batch(length, batch, padding=eod)
