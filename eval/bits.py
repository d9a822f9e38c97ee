"""Bits per byte on held-out documents: what a compressor driven by the model would write, over what it would read.

Every byte of a document is paid for. Its first token has no context and is charged ln(vocab); the end-of-document token
costs what the model says and counts no byte. Losses are summed by document, in fp64, over all ranks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minka.data.store import Split
from minka.eval.windows import Rows, Window, filler, rows, windows
from minka.parallel.engine import Scorer
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig
from minka.plan.run import write_json

SUITE = "heldout"
VERSION = 1


class Scores(NamedTuple):
    """`scores` and `stderr` by name: bits_per_byte and bits_per_byte/SOURCE."""

    scores: dict[str, float]
    stderr: dict[str, float]
    documents: int
    bytes: int
    tokens: int


def heldout(scorer: Scorer, split: Split, config: RunConfig, mesh: Mesh, eod: int, alive: Callable[[], None]) -> Scores:
    """Score the first eval.max_documents documents of `split` (0 = all). Collective; equal on every rank.

    Windows of data.seq_len overlap by half: a target has at least half a sequence of context where there is one.
    """
    count = min(config.eval.max_documents or split.n_documents, split.n_documents)
    nats = torch.zeros(count, dtype=torch.float64, device=mesh.device)
    for batch in _my_batches(split, count, config, mesh, eod):
        here = batch.to(mesh.device)
        losses = scorer.token_losses(here)
        owned = here.owners >= 0
        nats.index_add_(0, here.owners[owned], losses[owned].double())
        alive()
    mesh.sum_(nats)
    sizes = split.document_bytes[:count].astype(np.float64)
    tokens = int(sum(len(split.document(i)) for i in range(count)))
    bits = (nats.cpu().numpy() + math.log(config.model.vocab)) / math.log(2)
    sources = np.array([split.source_of(i) for i in range(count)])
    scores, stderr = {}, {}
    for name, chosen in [("", np.ones(count, bool))] + [(f"/{s}", sources == s) for s in sorted(set(sources))]:
        ratio, error = ratio_of_sums(bits[chosen], sizes[chosen])
        scores["bits_per_byte" + name], stderr["bits_per_byte" + name] = ratio, error
    return Scores(scores, stderr, count, int(sizes.sum()), tokens)


def write_scores(
    evals: Path, step: int, tokens: int, scores: Scores, samples: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Write evals/step-XXXXXXXX/heldout@1.json and return what it holds."""
    result = {
        "format": 1,
        "suite": SUITE,
        "version": VERSION,
        "step": step,
        "tokens": tokens,
        "scores": scores.scores,
        "stderr": scores.stderr,
        "documents": scores.documents,
        "bytes": scores.bytes,
        "document_tokens": scores.tokens,
        "samples": [{"prompt": prompt, "text": text} for prompt, text in samples],
    }
    folder = evals / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{SUITE}@{VERSION}.json", result)
    return result


def ratio_of_sums(bits: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """sum(bits) / sum(sizes) and its standard error over documents (Cochran 1977, section 2.11; NaN for one)."""
    ratio = bits.sum() / sizes.sum()
    if len(bits) < 2:
        return float(ratio), math.nan
    residual = bits - ratio * sizes
    error = math.sqrt(residual.var(ddof=1) / len(bits)) / sizes.mean()
    return float(ratio), float(error)


def _my_batches(split: Split, count: int, config: RunConfig, mesh: Mesh, eod: int) -> Iterator[Rows]:
    """This rank's batches; every rank gives as many as the one with most."""
    length, batch, ways = config.data.seq_len, config.eval.batch_sequences, mesh.layout.data_ways
    cut = (w for i in range(count) for w in windows(i, np.asarray(split.document(i)), length, max(1, length // 2)))
    mine = rows(_every(cut, mesh.data_rank, ways), length, batch, eod)
    while True:
        rows_here = next(mine, None)
        if not mesh.sum_on_host([rows_here is not None])[0]:
            return
        yield rows_here if rows_here is not None else filler(length, batch, eod)


def _every(cut: Iterator[Window], first: int, step: int) -> Iterator[Window]:
    return islice(cut, first, None, step)
