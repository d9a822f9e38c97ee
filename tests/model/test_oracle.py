"""A hundred steps of a reference that shares no line with minka give the same losses and gradient norms."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minka.model.hub import their_name
from minka.model.init import initialise
from minka.model.transformer import IGNORED, Transformer
from minka.plan.sections import ModelSection
from models import plain

STEPS, WARMUP, PEAK, FINAL = 100, 10, 3e-3, 0.1
BATCH, LENGTH, MICRO_BATCHES, MAX_NORM, DECAY = 4, 32, 2, 0.5, 0.1
CFG = ModelSection(layers=2, d_model=32, heads=4, kv_heads=2, head_dim=8, d_ff=72, vocab=256)


class Step(NamedTuple):
    """What is compared: nats a target and the norm before clipping."""

    loss: float
    norm: float


def batches() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For every step its micro-batches of (tokens, targets): text that can be learned, a fifth of it masked."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        begin = torch.randint(0, 256, (BATCH, 1), generator=generator)
        line = (
            begin + torch.arange(LENGTH + 1) * 7 + torch.randint(0, 3, (BATCH, LENGTH + 1), generator=generator)
        ) % 256
        tokens, targets = line[:, :-1], line[:, 1:].clone()
        targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORED
        targets[0, : LENGTH // 2] = IGNORED  # micro-batches with unequal counts: a mean of means would show
        yield list(zip(tokens.chunk(MICRO_BATCHES), targets.chunk(MICRO_BATCHES), strict=True))


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return PEAK * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * progress)))


def reference(weights: dict[str, Tensor]) -> list[Step]:
    """transformers' Llama under torch.optim.AdamW, written out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=72,
            rms_norm_eps=1e-5,
            use_cache=False,
        )
    )
    model.load_state_dict({their_name(name): tensor.clone() for name, tensor in weights.items()})
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
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(Step(total, norm.item()))
    return steps


def ours(model: Transformer) -> list[Step]:
    """The same run on minka's model."""
    undecayed = ("norm.weight", "embedding.weight", "head.weight")
    matrices = [p for n, p in model.named_parameters() if not n.endswith(undecayed)]
    others = [p for n, p in model.named_parameters() if n.endswith(undecayed)]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    steps = []
    for number, micro_batches in enumerate(batches()):
        count = sum(int((targets != IGNORED).sum()) for _, targets in micro_batches)
        sums = [model(*plain(tokens), targets) for tokens, targets in micro_batches]
        for part in sums:
            (part.objective / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(Step(sum(part.loss.item() for part in sums) / count, norm.item()))
    return steps


def compare(mine: Sequence[Step], theirs: Sequence[Step]) -> None:
    """Losses to 1e-5 nats, norms to 1e-4 of themselves, at every step."""
    assert len(mine) == len(theirs) == STEPS
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert abs(a.loss - b.loss) <= 1e-5, f"step {number}: loss {a.loss} and {b.loss}"
        assert abs(a.norm - b.norm) <= 1e-4 * b.norm, f"step {number}: norm {a.norm} and {b.norm}"


def test_a_hundred_steps_are_those_of_an_independent_reference() -> None:
    model = Transformer(CFG)
    initialise(model, 3, CFG)
    theirs = reference({name: p.detach().clone() for name, p in model.named_parameters()})
    compare(ours(model), theirs)
    assert theirs[-1].loss < theirs[0].loss - 1  # it did learn
    assert any(step.norm > MAX_NORM for step in theirs)  # and was clipped
