"""`minka plan budget`: what to train with a budget, what loss to expect, and what every other law would say."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from minka.plan.best_split import check_epochs
from minka.plan.compute_budget import GOALS, BudgetAsked, BudgetMachine, Goal, check_asked, flops_of
from minka.plan.errors import UserError
from minka.plan.flops import Shape, parameters
from minka.plan.loss_laws import LAWS, BudgetSplit, LossLaw
from minka.plan.shape_of_size import shape_of_size
from minka.plan.time_plan import duration
from minka.plan.tuning_laws import Sizes, batch_band, beta2, rate_band, rounded_batch, weight_decay

WATTS_KNOWN = "boards at their most, without hosts and cooling"


class Wishes(NamedTuple):
    """What else is decided beforehand; 0: by the plan."""

    vocab: int = 0
    seq_len: int = 0
    most_epochs: float = 16.0


SMALLEST_FITTED, LARGEST_FITTED, SMALLEST_TUNED = 5e7, 2e11, 1e7  # weights
WIDE = 3.0  # of the highest rate over the lowest
FREE = Wishes()


def budget_plan(asked: BudgetAsked, machine: BudgetMachine, goal: Goal, wishes: Wishes = FREE) -> dict[str, Any]:
    """Return what the JSON has. Raises UserError for a budget that is contradictory or that reaches nothing."""
    check_asked(asked)
    total = flops_of(asked, machine)
    best = goal.split(asked, total)
    shape = shape_of_size(best.parameters, wishes.vocab)
    size = parameters(shape)
    tokens = best.tokens
    if total is not None and asked.tokens is None:
        tokens = goal.tokens_left(total, size)  # what the shape's rounding left
    elif asked.loss is not None and asked.tokens is None:
        tokens = goal.law.tokens_for(size, asked.loss)
    if not 1 <= tokens < math.inf:
        what = f"nothing is left to train {size:,} weights"
        raise UserError(what, where="minka plan budget", remedy="spend more, or say fewer --params")
    seq_len = wishes.seq_len or usual_length(size)
    epochs = tokens / goal.unique_tokens if goal.unique_tokens else None
    notes = [check_epochs(epochs, wishes.most_epochs)] if epochs else []
    flops = 6 * size * tokens
    found: dict[str, Any] = {
        "parameters": size,
        "tokens": round(tokens),
        "flops": flops,
        "inference_flops": 2 * size * goal.inference_tokens,
        "tokens_per_parameter": tokens / size,
        "unique_tokens": goal.unique_tokens or None,
        "epochs": epochs,
        "loss": goal.loss(size, tokens),
        "loss_interval": list(_interval(goal, size, tokens)),
        "law": goal.law.name,
        "law_source": goal.law.source,
        "asked": asked.given(GOALS),
        "optimum": {"parameters": best.parameters, "tokens": best.tokens},
        "alternatives": _alternatives(goal, best, total),
        "shape": _shape_keys(shape),
        "seq_len": seq_len,
    }
    found |= _tuning(shape, size, tokens, seq_len)
    found |= _cost(machine, flops)
    if size < SMALLEST_TUNED:
        notes.append("laws of batch size and learning rate were fitted above 10M weights; try two rates")
    if not goal.law.bootstrap and not SMALLEST_FITTED <= size <= LARGEST_FITTED:
        notes.append(
            f"published laws were fitted to {short(SMALLEST_FITTED)} to {short(LARGEST_FITTED)} weights: here the loss "
            "is a guess, and the split an extrapolation; `minka plan fit` makes a law of your own runs"
        )
    if (span := found["learning_rate"]["high"] / found["learning_rate"]["low"]) > WIDE:
        notes.append(f"laws of the learning rate span a factor of {span:.1f}: short runs at both ends decide better")
    if found["loss"] > math.log(shape.vocab):
        guess = math.log(shape.vocab)
        notes.append(f"the law's loss is above that of guessing, {guess:.2f}: it says nothing about so small a model")
    found["notes"] = [note for note in notes if note]
    return found


def usual_length(size: float) -> int:
    """Return tokens of a sequence for so many weights."""
    return next(length for least, length in ((7e9, 8192), (1e9, 4096), (3e7, 2048), (0, 256)) if size >= least)


def _interval(goal: Goal, size: float, tokens: float) -> tuple[float, float]:
    """The law's interval, moved by what repeated data changes."""
    low, high = goal.law.interval(size, tokens)
    factor = goal.loss(size, tokens) / goal.law.loss(size, tokens)
    return low * factor, high * factor


def _alternatives(goal: Goal, best: BudgetSplit, total: float | None) -> list[dict[str, Any]]:
    """What the other laws do with the same FLOPs: with new data, and without use."""
    flops = 6 * best.parameters * best.tokens if total is None else total
    rows = []
    for law in LAWS.values():
        if law.name == goal.law.name:
            continue
        split = law.optimum(flops)
        loss = law.loss(*split) if isinstance(law, LossLaw) else None
        row = {"law": law.name, "parameters": split.parameters, "tokens": split.tokens, "loss": loss}
        rows.append(row | {"source": law.source, "note": law.note})
    return rows


def _shape_keys(shape: Shape) -> dict[str, Any]:
    names = ("layers", "d_model", "heads", "kv_heads", "head_dim", "d_ff", "vocab", "tied", "qk_norm")
    return {name: getattr(shape, name) for name in names}


def _tuning(shape: Shape, size: float, tokens: float, seq_len: int) -> dict[str, Any]:
    vocabulary = shape.vocab * shape.d_model * (1 if shape.tied else 2)
    sizes = Sizes(size, max(size - vocabulary, 1.0), tokens)
    batch, rate = batch_band(sizes), rate_band(sizes)
    used = rounded_batch(min(batch.value, tokens / 50), seq_len)  # at least fifty steps
    decay, decay_source = weight_decay(sizes, used, rate.value)
    second, second_source = beta2(used)
    steps = max(1, round(tokens / used))
    # Step Law's runs have 2,000 steps of it, Porian's a token for each weight; a short run affords a tenth.
    warmup = max(1, min(2000, steps // 10, max(20, round(size / used))))
    return {
        "batch_tokens": batch.as_dict() | {"value": used},
        "learning_rate": rate.as_dict(),
        "weight_decay": {"value": min(decay, 1.0), "source": decay_source},
        "beta2": {"value": second, "source": second_source},
        "schedule": {"kind": "cosine", "steps": steps, "warmup_steps": warmup, "final_ratio": 0.05},
    }


def _cost(machine: BudgetMachine, flops: float) -> dict[str, Any]:
    keys = ("gpu", "gpus", "mfu", "gpu_hours", "days", "dollars", "kwh")
    if machine.cluster is None:
        return dict.fromkeys(keys)
    hours = flops / machine.flops_per_hour
    watts, price = machine.cluster.watts, machine.dollars_per_hour
    values = [machine.cluster.name, machine.gpus, machine.mfu, hours, hours / 24 / machine.gpus]
    values += [None if price is None else hours * price, hours * watts / 1000 if watts else None]
    return dict(zip(keys, values, strict=True))


def budget_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table for people."""
    low, high = found["loss_interval"]
    batch, rate, schedule = found["batch_tokens"], found["learning_rate"], found["schedule"]
    best = short(found["optimum"]["parameters"])
    exact = f"{found['parameters']:,}; {'asked for' if found['asked'] else 'optimum of the law'} {best}"
    rows = [
        ["weights", short(found["parameters"]), exact],
        ["tokens", short(found["tokens"]), f"{found['tokens_per_parameter']:.1f} a weight"],
        ["FLOPs", f"{found['flops']:.3g}", "6 N D"],
        ["loss", f"{found['loss']:.3f}", f"nats a token, 90 % of runs {low:.3f} to {high:.3f}; law {found['law']!r}"],
        ["shape", f"{found['shape']['layers']} layers", shape_text(found["shape"])],
        ["batch", short(batch["value"]), f"tokens; laws {short(batch['low'])} to {short(batch['high'])}"],
        ["learning rate", f"{rate['value']:.2g}", f"laws {rate['low']:.2g} to {rate['high']:.2g}"],
        ["weight decay", f"{found['weight_decay']['value']:.2g}", found["weight_decay"]["source"]],
        ["steps", f"{schedule['steps']:,}", f"{schedule['kind']}, {schedule['warmup_steps']:,} of them warm-up"],
    ]
    if found["epochs"]:
        rows.insert(2, ["passes", f"{found['epochs']:.1f}", f"over {short(found['unique_tokens'])} unique tokens"])
    if found["inference_flops"]:
        rows.insert(3, ["FLOPs of use", f"{found['inference_flops']:.3g}", "2 N a token"])
    if found["gpu"]:
        rows.append(["GPU-hours", f"{found['gpu_hours']:,.3g}", _spent(found)])
    return rows


def shape_text(shape: Mapping[str, Any]) -> str:
    """Return the sizes of a model in words."""
    heads = f"{shape['heads']} heads of {shape['head_dim']}, {shape['kv_heads']} of keys"
    return f"of width {shape['d_model']:,}; {heads}; feed-forward {shape['d_ff']:,}; vocabulary {shape['vocab']:,}"


def _spent(found: Mapping[str, Any]) -> str:
    machines = f"{found['gpus']:,} x {found['gpu']} at {found['mfu']:.0%} MFU (6n)"
    parts = [f"{duration(found['days'])} of {machines}"]
    parts += [] if found["dollars"] is None else [f"${found['dollars']:,.0f}"]
    parts += [] if found["kwh"] is None else [f"{found['kwh']:,.0f} kWh of {WATTS_KNOWN}"]
    return ", ".join(parts)


def alternative_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the other laws, under their head."""
    rows = [["law", "weights", "tokens", "a weight", "loss", ""]]
    for one in found["alternatives"]:
        loss = "" if one["loss"] is None else f"{one['loss']:.3f}"
        ratio = f"{one['tokens'] / one['parameters']:.1f}"
        rows.append([one["law"], short(one["parameters"]), short(one["tokens"]), ratio, loss, one["note"]])
    return rows


def short(count: float) -> str:
    """Return a count with three digits and k, M, B or T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"
