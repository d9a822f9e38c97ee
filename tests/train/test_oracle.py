"""A hundred steps of a reference that shares no line with minka give the same losses and gradient norms."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minka.data.batch import Batch
from minka.model.hub_folder import their_name
from minka.parallel.mesh import start_mesh
from minka.plan.config import RunConfig
from minka.train.accept_step import accepts
from minka.train.build_engine import build_engine
from minka.train.schedule import learning_rate
from ranks import on_ranks
from tiny import tiny

STEPS, WARMUP, PEAK, FINAL = 100, 10, 3e-3, 0.1
BATCH, LENGTH, MICRO_BATCHES, MAX_NORM, DECAY, IGNORED = 4, 32, 2, 0.5, 0.1, -100


class Step(NamedTuple):
    """What is compared: nats a target, and the norm before clipping."""

    loss: float
    norm: float


def batches() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For every step its micro-batches of (tokens, targets): text that can be learned, a fifth of it masked."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        begin = torch.randint(0, 256, (BATCH, 1), generator=generator)
        noise = torch.randint(0, 3, (BATCH, LENGTH + 1), generator=generator)
        line = (begin + torch.arange(LENGTH + 1) * 7 + noise) % 256
        tokens, targets = line[:, :-1], line[:, 1:].clone()
        targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORED
        targets[0, : LENGTH // 2] = IGNORED  # micro-batches with unequal counts: a mean of means would show
        yield list(zip(tokens.chunk(MICRO_BATCHES), targets.chunk(MICRO_BATCHES), strict=True))


def whole_rows(tokens: Tensor, targets: Tensor) -> Batch:
    """A micro-batch of rows that are one document each."""
    positions, count = torch.arange(LENGTH).expand_as(tokens), int((targets != IGNORED).sum())
    return Batch(tokens, targets, torch.zeros_like(tokens), positions, torch.arange(len(tokens)), count)


def reference(weights: dict[str, Tensor]) -> list[Step]:
    """transformers' Llama under torch.optim.AdamW and a cosine, written out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config: Any = LlamaConfig(vocab_size=256, intermediate_size=72, rms_norm_eps=1e-5, use_cache=False, **shape)
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    matrices = [
        p for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n
    ]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    steps = []
    for number, micro_batches in enumerate(batches()):
        count = sum(int((targets != IGNORED).sum()) for _, targets in micro_batches)
        total = 0.0
        for tokens, targets in micro_batches:
            logits = model(input_ids=tokens).logits.flatten(0, 1)
            loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum") / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        progress = max(0, number + 1 - WARMUP) / (STEPS - WARMUP)
        cosine = FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1.0, (number + 1) / WARMUP) * cosine
        optimizer.step()
        optimizer.zero_grad()
        steps.append(Step(total, norm.item()))
    return steps


def ours(config: RunConfig) -> tuple[dict[str, Any], list[Step]]:
    """Initial weights under transformers' names, and the same run by minka's engine, optimizer and schedule."""
    steps = []
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        pieces = {name: piece for name, piece in engine.tensors().items() if name.startswith("model.")}
        initial = {their_name(name.removeprefix("model.")): p.local.numpy().copy() for name, p in pieces.items()}
        for number, micro_batches in enumerate(batches()):
            parts = [whole_rows(*pair) for pair in micro_batches]  # each row is one document
            mine = [engine.prepare(part) for part in parts[mesh.rank :: mesh.ranks]]
            count = sum(part.target_count for part in parts)
            sums = engine.forward_backward(mine, count)
            norm = engine.grad_norm()
            engine.apply(learning_rate(config, number, 0), config.optimizer.max_norm, accepts(sums, norm))
            steps.append(Step(float(sums.loss) / count, float(norm)))
    return initial, steps


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_hundred_steps_are_those_of_an_independent_reference(ranks: int, tmp_path: Path) -> None:
    config = tiny(
        tmp_path,
        run={"max_steps": STEPS},
        model={"z_loss": 0.0},
        optimizer={"learning_rate": PEAK, "max_norm": MAX_NORM, "weight_decay": DECAY},
        schedule={"warmup": WARMUP, "final_ratio": FINAL},
    )
    ((weights, _),) = on_ranks(ours, 1, config)  # whole tensors: bitwise those of any layout
    theirs = reference({name: torch.from_numpy(array) for name, array in weights.items()})
    for _, mine in on_ranks(ours, ranks, config):
        assert len(mine) == len(theirs) == STEPS
        worst = max(abs(a.loss - b.loss) for a, b in zip(mine, theirs, strict=True))
        norms = max(abs(a.norm - b.norm) / b.norm for a, b in zip(mine, theirs, strict=True))
        print(f"{ranks} ranks: loss {worst:.1e} nats, gradient norm {norms:.1e} of itself")
        assert worst <= 1e-5
        assert norms <= 1e-4
    assert theirs[-1].loss < theirs[0].loss - 1  # it did learn
    assert any(step.norm > MAX_NORM for step in theirs)  # and was clipped
