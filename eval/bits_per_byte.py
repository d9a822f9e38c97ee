"""Bits per byte on held-out documents: what a compressor driven by the model would write, over what it would read.

Every byte of a document is paid for. Its first token has no context and is charged ln(vocab); the end-of-document token
costs what the model says and counts no byte. Losses are summed by document, in fp64, over all ranks.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minka.data.token_store import Split
from minka.eval.scoring_windows import ScoringBatch, Window, filler, rows, windows
from minka.parallel.engine import Scorer
from minka.parallel.mesh import Mesh
from minka.plan.atomic import write_json
from minka.plan.config import RunConfig

SUITE = "heldout"
VERSION = 1


class Scores(NamedTuple):
    """`scores` and `stderr` by name: bits_per_byte and bits_per_byte/SOURCE.

    `settings` are all that the numbers depend on besides the weights and the data.
    """

    scores: dict[str, float]
    stderr: dict[str, float]
    documents: int
    bytes: int
    tokens: int
    settings: dict[str, int]


def heldout(scorer: Scorer, split: Split, config: RunConfig, mesh: Mesh, eod: int, alive: Callable[[], None]) -> Scores:
    """Score the first eval.max_documents documents of `split` (0 = all). Collective; equal on every rank.

    Windows of data.seq_len overlap by half (`stride_of`): a target has at least half a sequence of context where
    there is one.
    """
    count = min(config.eval.max_documents or split.n_documents, split.n_documents)
    nats = torch.zeros(count, dtype=torch.float64, device=mesh.device)
    for batch in _my_batches(split, count, config, mesh, eod):
        losses = scorer.token_losses(scorer.prepare(batch))
        owners = batch.owners.clamp(min=0).flatten().to(mesh.device)  # who owns no target has a loss of 0
        nats.index_add_(0, owners, losses.flatten().double())
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
    length = config.data.seq_len
    settings = {"max_documents": config.eval.max_documents, "window": length, "stride": stride_of(length)}
    return Scores(scores, stderr, count, int(sizes.sum()), tokens, settings)


def write_scores(
    evals: Path,
    step: int,
    tokens: int,
    scores: Scores,
    samples: Sequence[tuple[str, str]] | None = None,
    checkpoint: Path | None = None,
    *,
    own: bool = True,
) -> dict[str, Any]:
    """Write evals/step-XXXXXXXX/heldout@1.json; what it holds, and its `path`.

    A result that was made with other settings than the run's (`own` is false), or than the one that is there, goes
    beside it: heldout@1-HASH.json, by the settings. None for `samples` keeps those of the result that is replaced.
    `checkpoint`: None if weights in memory were scored. Raises OSError.
    """
    folder = evals / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{SUITE}@{VERSION}.json"
    if not own or (file.exists() and _read(file).get("settings") != scores.settings):
        settings = json.dumps(scores.settings, sort_keys=True)
        file = folder / f"{SUITE}@{VERSION}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.json"
    texts = [{"prompt": prompt, "text": text} for prompt, text in samples or ()]
    result = {
        "format": 1,
        "suite": SUITE,
        "version": VERSION,
        "step": step,
        "tokens": tokens,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "settings": scores.settings,
        "scores": scores.scores,
        "stderr": scores.stderr,
        "documents": scores.documents,
        "bytes": scores.bytes,
        "document_tokens": scores.tokens,
        "samples": _read(file).get("samples", []) if samples is None else texts,
    }
    write_json(file, result)
    return result | {"path": str(file)}


def stride_of(length: int) -> int:
    """Tokens between the beginnings of two windows of `length`."""
    return max(1, length // 2)


def _read(file: Path) -> dict[str, Any]:
    """A result that was written before; empty where there is none, or none that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def ratio_of_sums(bits: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """sum(bits) / sum(sizes) and its standard error over documents (Cochran 1977, section 2.11; NaN for one)."""
    ratio = bits.sum() / sizes.sum()
    if len(bits) < 2:
        return float(ratio), math.nan
    residual = bits - ratio * sizes
    error = math.sqrt(residual.var(ddof=1) / len(bits)) / sizes.mean()
    return float(ratio), float(error)


def _my_batches(split: Split, count: int, config: RunConfig, mesh: Mesh, eod: int) -> Iterator[ScoringBatch]:
    """This rank's batches; every rank gives as many as the one with most."""
    length, batch, ways = config.data.seq_len, config.eval.batch_sequences, mesh.layout.data_ways
    cut = (w for i in range(count) for w in windows(i, np.asarray(split.document(i)), length, stride_of(length)))
    mine = rows(_every(cut, mesh.data_rank, ways), length, batch, eod)
    while True:
        rows_here = next(mine, None)
        if not mesh.sum_on_host([rows_here is not None])[0]:
            return
        yield rows_here if rows_here is not None else filler(length, batch, eod)


def _every(cut: Iterator[Window], first: int, step: int) -> Iterator[Window]:
    return islice(cut, first, None, step)
