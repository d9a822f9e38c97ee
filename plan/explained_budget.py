"""What the keys of `minka plan budget`, `fit` and `cadence` mean: (unit, formula, inputs, source) by key."""

Row = tuple[str, str, str, str]
BUDGET = "the budget, --law, and what else was said"
HOFFMANN = "Hoffmann et al. 2022, arXiv:2203.15556"
TUNING = "plan/tuning_laws.py has the laws"
RUNS = "the runs that were given"
LAW = f"L = E + A / N^alpha + B / D^beta; {HOFFMANN}, section 3.3"
FIT = f"{HOFFMANN}, appendix D.3; plan/fit_law.py"
DALY = "Daly 2006, A higher order estimate of the optimum checkpoint interval; plan/cadence.py"
JOB = "--gpus or --mtbf-hours, --save-seconds, --restart-seconds, --flush-seconds"
ROUNDED = "the law's optimum; shapes are rounded to what suits tiles, heads and layouts (plan/shape_of_size.py)"


def _band(name: str, unit: str, step: str, deepseek: str, porian: str) -> dict[str, Row]:
    formulas = {"step": step, "deepseek": deepseek, "porian": porian}
    inputs = "weights N (step: n without the vocabulary), tokens D, C = 6 N D"
    return {
        name: (unit, "a band, because published laws disagree", inputs, TUNING),
        f"{name}.value": (unit, "the middle one of the laws", inputs, TUNING),
        f"{name}.low": (unit, "the least of the laws", inputs, TUNING),
        f"{name}.high": (unit, "the most of the laws", inputs, TUNING),
        f"{name}.source": ("text", "whose value it is", inputs, TUNING),
        f"{name}.laws": (unit, "what each law says", inputs, TUNING),
        **{f"{name}.laws.{law}": (unit, formula, inputs, TUNING) for law, formula in formulas.items()},
    }


BUDGETS: dict[str, Row] = {
    "tokens": ("tokens", "what the budget leaves for this shape: (C / 2N - inference tokens) / 3", BUDGET, ROUNDED),
    "flops": ("FLOPs", "6 N D of training", "parameters, tokens", "Kaplan et al., arXiv:2001.08361"),
    "inference_flops": ("FLOPs", "2 N a token of use", "parameters, --inference-tokens", "arXiv:2401.00448"),
    "tokens_per_parameter": ("tokens", "tokens / parameters", "tokens, parameters", ROUNDED),
    "unique_tokens": ("tokens or null", "tokens that differ", "--unique-tokens", "the command line"),
    "epochs": ("passes or null", "tokens / unique_tokens", "tokens, --unique-tokens", "arXiv:2305.16264"),
    "loss": ("nats a token", "the law at parameters and tokens; repeated ones count less", BUDGET, LAW),
    "loss_interval": (
        "nats a token",
        (
            "where 90 % of such runs end: the spread of runs about the law (0.75 % of the loss for published ones) and "
            "that of the law's refits where it has any; a different text or tokenizer is not in it"
        ),
        BUDGET,
        LAW,
    ),
    "law": ("name", "--law", "--law", "plan/loss_laws.py"),
    "law_source": ("text", "who fitted it, to what", "--law", "plan/loss_laws.py"),
    "asked": ("list", "which of parameters, tokens and loss were said", BUDGET, "the command line"),
    "optimum": ("table", "before the shape is rounded: the law's, or what was asked for", BUDGET, LAW),
    "optimum.parameters": ("weights", "G (C/6)^a, a = beta / (alpha + beta)", BUDGET, f"{HOFFMANN}, equation 4"),
    "optimum.tokens": ("tokens", "(C/6)^(1-a) / G", BUDGET, f"{HOFFMANN}, equation 4"),
    "alternatives": ("list", "what other laws do with the same FLOPs of new data", BUDGET, "plan/loss_laws.py"),
    "alternatives.law": ("name", "of the law", "plan/loss_laws.py", "plan/loss_laws.py"),
    "alternatives.parameters": ("weights", "its best", BUDGET, "plan/loss_laws.py"),
    "alternatives.tokens": ("tokens", "its best", BUDGET, "plan/loss_laws.py"),
    "alternatives.loss": ("nats or null", "of its own text; null where it says nothing of it", BUDGET, LAW),
    "alternatives.source": ("text", "the paper", "plan/loss_laws.py", "plan/loss_laws.py"),
    "alternatives.note": ("text", "what to know before it is trusted", "plan/loss_laws.py", "plan/loss_laws.py"),
    **_band(
        "batch_tokens",
        "tokens",
        "0.58 D^0.571",
        "0.2920 C^0.3271",
        "160 x 2048 (N / 108M)^(2/3)",
    ),
    "batch_tokens.value": (
        "tokens",
        "the middle one of the laws, to 2^k or 3 x 2^k sequences, at most a fiftieth of the run",
        "batch_tokens.laws, seq_len, tokens",
        TUNING,
    ),
    **_band(
        "learning_rate",
        "rate",
        "1.79 n^-0.713 D^0.307, the peak of a cosine",
        "0.3118 C^-0.125",
        "0.0047 (N / 108M)^(-1/3)",
    ),
    "weight_decay": ("table", "so that AdamW's memory is the best share of the run", BUDGET, "arXiv:2505.13738"),
    "weight_decay.value": (
        "factor",
        "batch / (rate x tokens x 1.084 (D/N)^-0.527), at most 1",
        "batch_tokens.value, learning_rate.value, tokens, parameters",
        "arXiv:2505.13738",
    ),
    "weight_decay.source": ("text", "the paper", "the paper", "plan/tuning_laws.py"),
    "beta2": ("table", "of the second moment", "batch_tokens.value", "arXiv:2406.19146"),
    "beta2.value": (
        "decay",
        "0.99 below batches of 524,288 tokens, else 0.95",
        "batch_tokens.value",
        "arXiv:2406.19146",
    ),
    "beta2.source": ("text", "the paper", "the paper", "plan/tuning_laws.py"),
    "schedule.kind": ("choice", "cosine: the laws of the rate were fitted to it", "none", "arXiv:2503.04715"),
    "schedule.steps": ("steps", "tokens / batch", "tokens, batch_tokens.value", "plan/budget_plan.py"),
    "schedule.warmup_steps": (
        "steps",
        "a token for each weight, at least 20 steps, at most 2,000 and a tenth of the run",
        "parameters, batch_tokens.value, schedule.steps",
        "arXiv:2406.19146, 2503.04715",
    ),
    "schedule.final_ratio": ("fraction", "of the peak, at the end", "none", "plan/budget_plan.py"),
    "gpus": ("number", "--gpus", "--gpus", "the command line"),
    "kwh": ("kWh or null", "gpu_hours x the board's watts: not hosts, network and cooling", "--gpu", "data sheets"),
    "notes": ("list", "what to know", "the plan", "the plan"),
}
FITS: dict[str, Row] = {
    **{name: (unit, "of the law", RUNS, FIT) for name, unit in (("A", "nats"), ("B", "nats"), ("E", "nats a token"))},
    **dict.fromkeys(("alpha", "beta"), ("exponent", "of the law", RUNS, FIT)),
    "objective": ("number", "the sum of Huber(ln predicted - ln measured), linear beyond 1e-3", RUNS, FIT),
    "a": ("exponent", "beta / (alpha + beta): weights grow with FLOPs to the power a", "alpha, beta", HOFFMANN),
    "rows_used": ("runs", "fitted", RUNS, FIT),
    "rows_dropped": ("runs", "left out by the rule", RUNS, "outlier_rule"),
    "outlier_rule": ("text", "--drop-highest, --drop-outliers", RUNS, "plan/fit_plan.py"),
    "intervals": ("table", "2.5 % to 97.5 % of refits to runs drawn with replacement", "--bootstraps", FIT),
    **{
        f"intervals.{name}": ("pair", f"of {name}", "--bootstraps", FIT)
        for name in ("A", "B", "E", "alpha", "beta", "a")
    },
    "residual_rms": ("share", "root mean square of ln predicted - ln measured", RUNS, FIT),
    "optimum.flops": ("FLOPs", "--flops; default: those of the most expensive run", RUNS, FIT),
    "optimum.loss": ("nats a token", "the law at the optimum", RUNS, LAW),
    "optimum.parameters_interval": ("pair or null", "of the refits' optima, 95 %", "--bootstraps", FIT),
    "optimum.loss_interval": ("pair", "where 90 % of such runs end", "residual_rms, refits", FIT),
    "foresight": (
        "table or null",
        "the cheap 70 % of the runs fitted, the others predicted",
        RUNS,
        "plan/fit_plan.py",
    ),
    "foresight.fitted": ("runs", "cheap ones", RUNS, "plan/fit_plan.py"),
    "foresight.predicted": ("runs", "expensive ones", RUNS, "plan/fit_plan.py"),
    "foresight.up_to_flops": ("FLOPs", "of the most expensive run that was fitted", RUNS, "plan/fit_plan.py"),
    "foresight.mean_error": ("share", "mean of |predicted / measured - 1|", RUNS, "plan/fit_plan.py"),
    "foresight.largest_error": ("share", "with its sign", RUNS, "plan/fit_plan.py"),
    "foresight.covered": ("share", "of expensive runs within their 90 % interval", RUNS, "plan/fit_plan.py"),
    "runs.parameters": ("weights", "of the run", RUNS, "the table or the ledger"),
    "runs.tokens": ("tokens", "of the run", RUNS, "the table or the ledger"),
    "runs.loss": ("nats a token", "of held-out text at its end", RUNS, "the table, or evals/ of the run"),
    "runs.residual": ("share", "ln predicted - ln measured", RUNS, FIT),
    "runs.used": ("true or false", "whether the rule kept it", RUNS, "outlier_rule"),
}
CADENCE: dict[str, Row] = {
    "hours_between_failures": (
        "hours",
        "--mtbf-hours, or 24,000 / (failures of 1,000 node-days x nodes of eight)",
        "--gpus, --rate",
        "plan/cadence.py, RATES; small jobs fail of other causes too, so measure yours",
    ),
    "failures_source": ("text", "whose rate it is", "--rate", "plan/cadence.py"),
    "interval_seconds": ("seconds", "of training between saves: the most training for wall time", JOB, DALY),
    "interval_steps": ("steps or null", "interval_seconds / --step-seconds, rounded", JOB, DALY),
    "young_seconds": ("seconds", "sqrt(2 save M), M between failures", JOB, "Young 1974"),
    "daly_seconds": ("seconds", "Young's x (1 + x/3 + x^2/9) - save, x = sqrt(save / 2M)", JOB, DALY),
    "ettr": ("share", "interval / (M e^(R/M) (e^((interval + save)/M) - 1)), R a restart", JOB, DALY),
    "assumed": ("table", "what was said, or the default", JOB, "the command line"),
    "assumed.save": ("seconds", "--save-seconds", JOB, "the command line"),
    "assumed.restart": ("seconds", "--restart-seconds", JOB, "the command line"),
    "assumed.repair": ("hours", "--repair-hours", JOB, "the command line"),
    "lost": ("table", "the rest of wall time", JOB, DALY),
    "lost.saving": ("share", "in saves", JOB, DALY),
    "lost.again": ("share", "on steps that a failure undid", JOB, DALY),
    "lost.restarting": ("share", "from failures to first new steps", JOB, DALY),
    "evaluation_interval_seconds": (
        "seconds or null",
        "100 evaluations: 1 % of the time",
        "--evaluation-seconds",
        "plan",
    ),
    "evaluation_interval_steps": ("steps or null", "the same in steps", "--step-seconds", "plan/cadence_plan.py"),
    "spare_nodes": (
        "nodes",
        "no more than these are in repair at once in 99 % of the time, if failures are a Poisson process",
        "hours_between_failures, --repair-hours",
        "plan/cadence.py",
    ),
    "keep": ("table", "checkpoints that are worth their disk", "--run", "plan/cadence_plan.py"),
    "keep.newest": (
        "number",
        "enough to rewind 100 steps, at least 3",
        "interval_steps",
        "arXiv:2204.02311, section 5.1",
    ),
    "keep.tokens": (
        "list",
        "where the decay of a wsd schedule begins: other lengths branch from there",
        "--run",
        "plan",
    ),
    "keep.checkpoint_bytes": (
        "bytes or null",
        "12 a weight: fp32 weights and two moments",
        "--run",
        "docs/checkpoints.md",
    ),
    "keep.bytes": ("bytes or null", "of all that are kept, and the last", "--run", "plan/cadence_plan.py"),
}
CURVE = "losses of the run's steps, as medians of bins of ln tokens"
CHECK: dict[str, Row] = {
    "run": ("name", "the run", "the command line", "the ledger"),
    "action": ("word", "continue, probe or stop", "forecast, target, rules", "plan/forecast.py"),
    "reason": ("text", "the action in a sentence", "forecast, target, rules", "plan/forecast.py"),
    "step": ("steps", "the newest", "the ledger", "the ledger"),
    "tokens_of_the_run": ("tokens", "at its end", "the run", "plan/config.py"),
    "forecast": ("table or null", "where the curve ends; null while points are few", CURVE, "plan/forecast.py"),
    "forecast.value": (
        "nats a token",
        "of the likeliest fit, half the decay's gain",
        CURVE,
        "plan/forecast.py",
    ),
    "forecast.low": (
        "nats a token",
        "of the best likely fit of E + A / t^power, all of it",
        CURVE,
        "plan/forecast.py",
    ),
    "forecast.high": ("nats a token", "of the worst likely fit, without the decay", CURVE, "plan/forecast.py"),
    "target": ("nats a token", "--loss, or the law at the run's weights and tokens", "--loss, --law", LAW),
    "target_source": ("text", "who says so", "--loss, --law", "plan/check_plan.py"),
    "rules": ("table", "when a run is not worth its money", "--earliest, --margin", "plan/forecast.py, CheckRules"),
    "rules.earliest": ("share", "of the tokens: before it only divergence is judged", "--earliest", "the command line"),
    "rules.margin": ("share", "by which even the best end must miss the target", "--margin", "the command line"),
    "rules.annealing": ("share", "of the loss, that a decay of the rate may gain", "none", "plan/forecast.py"),
    "rules.most_annealing": ("share", "that no decay gains: below it a probe tells", "none", "plan/forecast.py"),
    "rules.diverged": ("share", "above the lowest loss so far", "none", "plan/forecast.py"),
    "tokens_per_second": ("tokens/s", "median of the newest readings", "the ledger", "the ledger"),
    "tokens_per_second_planned": ("tokens/s or null", "of plan.json", "plan.json of the run", "plan/step_time.py"),
    "days_left": ("days or null", "tokens left / tokens_per_second", "the ledger", "the ledger"),
}
LADDER: dict[str, Row] = {
    "target_flops": ("FLOPs", "of the large run", "--flops", "the command line"),
    "target_parameters": ("weights", "its best size, as the law is believed to be", "--law, --flops", LAW),
    "target_interval": ("pair", "where 95 % of fits to such runs put it", "--noise", "plan/ladder_design.py"),
    "ladder_flops": ("FLOPs", "of all runs; a branch only from where it begins", "the runs", "plan/ladder_design.py"),
    "ladder_share": ("share", "ladder_flops / target_flops", "the runs", "plan/ladder_design.py"),
    "ladder": ("list", "trunks, and branches that decay earlier", "--within, --sizes", "arXiv:2405.18392"),
    "ladder.run": ("name", "of the run", "the runs", "plan/ladder_plan.py"),
    "ladder.parameters": ("weights", "of its size", "--smallest, --sizes", "plan/ladder_design.py"),
    "ladder.tokens": ("tokens", "at its end", "parameters", "plan/ladder_design.py"),
    "ladder.start_from": (
        "run or null",
        "the trunk's checkpoint at 80 % of the branch",
        "the trunk",
        "arXiv:2405.18392",
    ),
    "ladder.flops": ("FLOPs", "6 N x tokens that it trains on itself", "parameters", "plan/ladder_plan.py"),
    "folder": ("path or null", "--emit", "--emit", "the command line"),
}
PLANNED = "plan.json of the run, written before its first step"
SCORE: dict[str, Row] = {
    "scores": ("list", "a row for each run", "the runs", "plan/score_plan.py"),
    "scores.run": ("name", "the run", "the command line", "the command line"),
    "scores.planned": ("true or false", "whether it has a plan", PLANNED, PLANNED),
    "scores.unchanged": ("true or false", "whether the plan has the hash that it had", PLANNED, "plan/outlook.py"),
    "scores.ended": ("true or false", "whether it was trained to its end", "the ledger", "the ledger"),
    "scores.planned_loss": ("nats a token", "the law's", PLANNED, LAW),
    "scores.planned_interval": ("pair", "where 90 % of such runs end", PLANNED, LAW),
    "scores.final_loss": ("nats a token", "of held-out text at the end", "evals/ of the run", "plan/fit_runs.py"),
    "scores.loss_error": ("share", "planned_loss / final_loss - 1", PLANNED, "plan/score_plan.py"),
    "scores.within": ("true or false", "whether final_loss is in planned_interval", PLANNED, "plan/score_plan.py"),
    "scores.speed_error": ("share", "planned tokens/s / the ledger's median - 1", PLANNED, "plan/score_plan.py"),
    "loss_mean_error": ("share", "mean size of loss_error", "the runs", "plan/score_plan.py"),
    "loss_within": ("share", "of the runs that are within", "the runs", "plan/score_plan.py"),
    "speed_mean_error": ("share", "mean size of speed_error", "the runs", "plan/score_plan.py"),
}
BUDGET_ROWS: dict[str, Row] = {**BUDGETS, **FITS, **CADENCE, **CHECK, **SCORE, **LADDER}
