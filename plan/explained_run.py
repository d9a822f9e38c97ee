"""What the keys of `minka plan time`, `layout` and `calibrate` mean: (unit, formula, inputs, source) by key."""

from minka.plan.flops import FORMULAS
from minka.plan.layout import Layout
from minka.plan.rates import FITTED

Row = tuple[str, str, str, str]
TIMED = "plan/step_time.py; its errors on published steps are in docs/numbers.md"
STEP = "the run, --world, --gpu, --rates"
SHARES = {
    "matrix": "matrix FLOPs / (peak x rates.matrix), recomputed ones too",
    "attention": "attention FLOPs (2 products forward, 5 backward, half masked) / (peak x rates.attention)",
    "memory": "bytes that kernels read and write / (memory bandwidth x rates.memory)",
    "launch": "passes through blocks x rates.layer_seconds, where that is more than what was launched",
    "tensor": "payload x (n-1)/n / (link x rates.link) + messages, four collectives a block forward, four backward",
    "context": "keys and values gathered, their gradients scattered, as for tensor",
    "shard": "weights gathered and gradients reduced: the first unit, what compute does not cover, and "
    "rates.exposed of what it does",
    "replicate": "gradients of this rank's shards summed over replicas, as for shard",
    "pipeline": "hidden states to the next stage and gradients back: payload / bandwidth + rates.message_seconds",
    "bubble": "GPipe, 1F1B: one pass through the stages of all other ranks; interleaved: through one stage of each; "
    "zbv: (p-1) max(f, i, f + 2i - 3w); dualpipev: (p-1)(f + 2i - w)",
    "optimizer": "bytes of state and gradients of this rank's shards / (memory bandwidth x rates.memory)",
}
TIME: dict[str, Row] = {
    "micro_batches": ("number", "batch_tokens / seq_len / data ranks / micro_batch, rounded up", "the run", "the run"),
    "step_seconds": ("seconds", "the sum of breakdown_seconds", STEP, TIMED),
    "breakdown_seconds": ("seconds", "of a step of the busiest rank, by what they are spent on", STEP, TIMED),
    **{f"breakdown_seconds.{kind}": ("seconds", text, STEP, TIMED) for kind, text in SHARES.items()},
    "tokens_per_second_per_gpu": ("tokens/s", "batch_tokens / step_seconds / world", STEP, TIMED),
    "pinned": ("table", "settings of the layout that overrides decide", "section.key=value", "the command line"),
    "padding": ("text", "how much of a step is spent on padding sequences; empty below 1 %", "the run", "the batch"),
    "does_not_fit": ("text", "why it does not fit into the memory; empty where it does", "peak_bytes", "plan memory"),
    "mfu": ("share", "one number by each convention", "training_flops_per_token, step_seconds", "docs/numbers.md"),
    **{
        f"mfu.{name}": (
            "share",
            f"batch_tokens x training_flops_per_token.{name} / (step_seconds x world x peak)",
            f"training_flops_per_token.{name}, step_seconds, the peak of the data sheet",
            "docs/numbers.md, MFU",
        )
        for name in FORMULAS
    },
    "steps": ("steps", "of the whole run, its batch warm-up included", "the run", "plan/config.py"),
    "save_seconds": ("seconds", "saves x 12 bytes a weight of a rank's shards / 20 GB/s", "the run", "PCIe 4 x16"),
    "evaluation_seconds": (
        "seconds",
        "evaluations x eval.max_documents / (data ranks x micro_batch) x a forward pass over a sequence",
        STEP,
        TIMED,
    ),
    "days": (
        "days",
        "steps x their seconds, saves and evaluations; smaller batches of the warm-up are shorter",
        STEP,
        TIMED,
    ),
    "gpu_hours": ("hours", "days x 24 x world", "days, world", TIMED),
    "dollars": ("dollars or null", "gpu_hours x --dollars", "gpu_hours, --dollars", "the price that was given"),
    "not_counted": ("list", "what days leave out", "the run", "plan/time_plan.py"),
    "calibrated": (
        "text",
        "the runs that the rates are fitted to, or that they are tabulated",
        "--rates",
        "plan/rates.py",
    ),
}
BEST = "of this layout"
LAYOUTS: dict[str, Row] = {
    "layouts": (
        "list",
        "the fastest that fit, fastest first, each of a kind with its best replicate and shard",
        STEP,
        TIMED,
    ),
    "layouts.layout": ("table", "section layout, with shard worked out", STEP, "docs/configuration.md"),
    **{
        f"layouts.layout.{name}": (
            "a number or a name",
            field.description or name,
            STEP,
            f"layout.{name} in docs/configuration.md",
        )
        for name, field in Layout.model_fields.items()
    },
    "layouts.overrides": ("list", "what makes the run have this layout", "the run, layouts.layout", "`minka train`"),
    "layouts.step_seconds": ("seconds", f"step_seconds {BEST}", STEP, TIMED),
    "layouts.breakdown_seconds": ("seconds", f"breakdown_seconds {BEST}", STEP, TIMED),
    **{f"layouts.breakdown_seconds.{kind}": ("seconds", text, STEP, TIMED) for kind, text in SHARES.items()},
    "layouts.peak_bytes": ("bytes", f"the largest ranks.peak_bytes {BEST}", STEP, "plan/memory.py"),
    "layouts.mfu": ("share", f"mfu.causal {BEST}", "layouts.step_seconds", "docs/numbers.md, MFU"),
    "layouts.warmup_refused": (
        "text",
        "why it is not legal during the batch warm-up; empty where it is",
        "the run",
        "rules",
    ),
    "searched": ("number", "legal layouts", STEP, "plan/layout_candidates.py"),
    "pruned": ("table", "layouts that are not legal or do not fit, by reason", STEP, "plan/layout_candidates.py"),
    "why": (
        "text",
        "the largest differences of breakdown_seconds to the second layout",
        "layouts",
        "plan/layout_plan.py",
    ),
    "neighbours": ("list", "the first layout with one setting changed", "layouts", "plan/layout_plan.py"),
    "neighbours.change": ("table", "the setting and its other value", "layouts", "plan/layout_plan.py"),
    "neighbours.step_seconds": ("seconds or null", "step_seconds with the change", "neighbours.change", TIMED),
    "neighbours.peak_bytes": (
        "bytes or null",
        "the largest peak with the change",
        "neighbours.change",
        "plan/memory.py",
    ),
    "neighbours.fits": (
        "true, false or null",
        "whether that leaves 8 % of the GPU",
        "neighbours.peak_bytes",
        "plan/memory.py",
    ),
    "neighbours.refused": ("text or null", "why the change is not legal", "neighbours.change", "docs/parallelism.md"),
    "benchmark": (
        "list",
        "commands that train each layout within 5 % of the first for 20 steps",
        "layouts",
        "`minka train`",
    ),
}
CALIBRATION: dict[str, Row] = {
    "rates": (
        "table",
        "the most probable rates given the runs and the tabulated ones",
        "the runs",
        "plan/calibrate.py",
    ),
    "tabulated": ("table", "rates before", "--gpu", "plan/rates.py"),
    **{
        f"{table}.{key}": (
            "seconds" if key.endswith("seconds") else "share",
            f"Rates.{key}",
            "the runs",
            "plan/rates.py",
        )
        for table in ("rates", "tabulated")
        for key in FITTED
    },
    "runs": ("list", "the runs that were given", "the command line", "their ledgers"),
    "runs.run": ("name", "its name", "run.name", "its ledger"),
    "runs.ranks": ("ranks", "its ranks", "its last start", "its ledger"),
    "runs.step_seconds": (
        "seconds",
        "batch_tokens / median of tokens_per_second, without the first reading",
        "its steps",
        "its ledger",
    ),
    "runs.error_before": ("share", "predicted / measured - 1 by tabulated rates", "runs.step_seconds", TIMED),
    "runs.error": ("share", "predicted / measured - 1 by the fitted rates", "runs.step_seconds", TIMED),
    "runs.error_left_out": ("share or null", "the same by rates fitted to all other runs", "runs.step_seconds", TIMED),
    "file": ("path or null", "where the rates were written", "-o", "the command line"),
}
ROWS: dict[str, Row] = {**TIME, **LAYOUTS, **CALIBRATION}
