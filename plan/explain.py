"""Where each number of a plan comes from: its unit, its formula, what goes in, and who says so. By key of the JSON."""

import difflib
from collections.abc import Mapping
from typing import NamedTuple

from minka.plan.errors import UserError
from minka.plan.explained_budget import BUDGET_ROWS
from minka.plan.explained_run import ROWS
from minka.plan.flops import FORMULAS, SYMBOLS, Convention
from minka.plan.layout import Layout


class Explanation(NamedTuple):
    """Of one key; a key below another is written with a dot, and the entries of a list have one explanation."""

    unit: str
    formula: str
    inputs: str
    source: str


GIVEN = "sizes, --recipe with its overrides, or --hf"
SHAPE = "plan/flops.py, Shape"
COUNTED = "counted; equal to the model that transformers builds, for every family that is read"
KAPLAN = "Kaplan et al., arXiv:2001.08361"
WEIGHTS = "L layers, d model width, h query heads, k key/value heads, e head width, f feed-forward width, V vocabulary"
INPUTS: Mapping[Convention, str] = {
    "causal": f"{WEIGHTS}, s tokens in a sequence; `formulas.causal` has the formula of this model",
    "palm": "N weights that a token passes through, L layers, h heads, e head width, s tokens in a sequence",
    "6n": "N weights that a token passes through, embedding and head included",
    "megatron": f"{WEIGHTS}, s tokens in a sequence; `formulas.megatron` has the formula of this model",
}
SOURCES: Mapping[Convention, str] = {
    "causal": "counted; equal to what torch counts on the model, but for the masked half of attention",
    "palm": "Chowdhery et al., arXiv:2204.02311, appendix B",
    "6n": f"{KAPLAN}, section 2.1",
    "megatron": "Narayanan et al., arXiv:2104.04473, section 3.3",
}
FIELDS = {  # of `shape`
    "layers": "layers",
    "d_model": "width of the hidden states",
    "heads": "query heads",
    "kv_heads": "heads of keys and values",
    "head_dim": "width of a head; null with latent attention, whose widths are in shape.latent",
    "d_ff": "width of the feed-forward network; of a model with experts, in its dense layers",
    "vocab": "rows of the embedding",
    "tied": "whether the head shares the embedding's weights",
    "biases": "none; qkv: of the query, key and value projections; qkvo: of all of attention; all: of every matrix but "
    "the head, and of the norms",
    "mlp_biases": "whether the feed-forward matrices have biases; so they do where shape.biases is all",
    "norm_biases": "whether the norms have biases; so they do where shape.biases is all",
    "qk_norm": "whether queries and keys pass through a norm, head by head",
    "whole_qk_norm": "whether queries and keys pass through a norm over all heads together",
    "mlp_matrices": "matrices of the feed-forward network: 3 where it is gated, else 2",
    "learned_positions": "rows of a position embedding; 0 with RoPE",
    "norms": "norms of width d_model in a layer",
    "experts": "feed-forward networks that a router chooses from, in each layer that has them; 1 in a dense model",
    "active_experts": "experts that the router sends a token to; 1 in a dense model",
    "expert_ff": "width of an expert; 0 in a dense model",
    "shared_ff": "width of the experts that every token passes through, together; 0 without them",
    "dense_layers": "of a model with experts, the layers that have one network of width d_ff instead",
    "latent": "widths of multi-head latent attention; null with any other attention",
    "latent.query_rank": "rank through which queries are projected; 0: directly",
    "latent.kv_rank": "rank through which keys and values are projected",
    "latent.rope_dim": "channels of a head that RoPE rotates",
    "latent.nope_dim": "channels of a head's queries and keys that RoPE does not rotate",
    "latent.value_dim": "channels of a head's values",
    "window": "tokens that some layers see at most; 0 where all layers see everything before",
    "windowed_layers": "layers that have the window",
}
MODEL: dict[str, Explanation] = {
    "shape": Explanation("table", "the sizes that are counted", GIVEN, SHAPE),
    **{f"shape.{name}": Explanation("a size or a kind", text, GIVEN, SHAPE) for name, text in FIELDS.items()},
    "seq_len": Explanation(
        "tokens",
        "--seq; without it all positions of --hf, data.seq_len of --recipe, else 2048",
        GIVEN,
        "the command line",
    ),
    "parameters": Explanation(
        "weights",
        "L(2d(h + k)e + 3df + norms and biases) + d + dV (2dV where the head is not tied) in a dense model; all "
        "experts, routers and projections of latent attention where there are any",
        WEIGHTS,
        COUNTED,
    ),
    "parameters_embedding": Explanation(
        "weights",
        "dV, 2dV where the head is not tied, and d for each learned position",
        "d model width, V vocabulary",
        COUNTED,
    ),
    "parameters_non_embedding": Explanation(
        "weights",
        "parameters - parameters_embedding",
        "parameters, parameters_embedding",
        f"the N of {KAPLAN}",
    ),
    "parameters_active": Explanation(
        "weights",
        "parameters less those of experts that a token is not sent to",
        "parameters, shape.experts, shape.active_experts",
        COUNTED,
    ),
    "training_flops_per_token": Explanation(
        "FLOPs a token",
        "one number by each convention, at seq_len tokens",
        "shape, seq_len",
        "docs/plan.md, Conventions",
    ),
    **{
        f"training_flops_per_token.{name}": Explanation(
            "FLOPs a token; a multiplication and an addition are two", formula, INPUTS[name], SOURCES[name]
        )
        for name, formula in FORMULAS.items()
    },
    "formulas": Explanation(
        "text",
        "how this model's training_flops_per_token come out, in the letters of symbols",
        "shape",
        "plan/flops.py",
    ),
    **{
        f"formulas.{name}": Explanation(
            "text", f"this model's training_flops_per_token.{name}, in the letters of symbols", "shape", SOURCES[name]
        )
        for name in FORMULAS
    },
    "symbols": Explanation("table", "the letters of formulas, with this model's values", "shape, seq_len", SHAPE),
    **{
        f"symbols.{letter}": Explanation("a number", text, "shape, seq_len", "plan/flops.py, SYMBOLS")
        for letter, text in SYMBOLS.items()
    },
    "uncounted": Explanation(
        "list of texts", "weights and settings of config.json that no count has", "--hf", "plan/hub_shape.py"
    ),
    "defaults": Explanation(
        "table",
        "settings that config.json leaves out and transformers' default for each: sizes, and flags that are true",
        "--hf",
        "transformers' configuration class of the family (plan/hub_defaults.py)",
    ),
    "note": Explanation(
        "text or null", "that seq_len is past the model's last position", "seq_len, the model's positions", "the model"
    ),
    "trainable": Explanation(
        "true or false", "whether run.start_from takes this model", GIVEN, "the code that reads run.start_from"
    ),
    "not_trainable_because": Explanation(
        "text or null", "why run.start_from refuses this model", GIVEN, "the code that reads run.start_from"
    ),
}
TRACED = "within 3 % of the dry run, which traces the step itself (tests/train/test_memory_plan.py)"
KINDS = {
    "weights": "this rank's shards, 2 or 4 bytes an element",
    "gradients": "whole ones that are added up, buffers they are reduced in, and reduced shards",
    "optimizer": "two moments for each element of this rank's shards",
    "activations": "saved for backward: all of a block, its products (selective), or its input (block)",
    "gathered": "FSDP's whole weights, and what context and tensor groups gather",
    "logits": "a chunk, in fp32 and in the compute dtype",
    "workspace": "between two operations, and what a pipeline receives and sends",
}
MEMORY: dict[str, Explanation] = {
    "world": Explanation("ranks", "--world", "the command line", "the command line"),
    "layout": Explanation(
        "table", "section layout, with shard worked out", "the run, --world", "docs/configuration.md"
    ),
    **{
        f"layout.{name}": Explanation(
            "a number or a name",
            field.description or name,
            "the run, --world",
            f"layout.{name} in docs/configuration.md",
        )
        for name, field in Layout.model_fields.items()
    },
    "warmup_refused": Explanation(
        "text",
        "why the layout is not legal during the batch warm-up; empty where it is",
        "the run",
        "docs/parallelism.md",
    ),
    "gpu": Explanation("name or null", "the GPU of --gpu", "--gpu", "plan/hardware.py"),
    "gpu_bytes": Explanation("bytes", "of the GPU's data sheet", "--gpu", "plan/hardware.py"),
    "ranks": Explanation("list", "the rank at each pipeline coordinate", "layout", "docs/plan.md"),
    "ranks.rank": Explanation("number", "the rank that is predicted", "layout", "docs/parallelism.md"),
    "ranks.stages": Explanation(
        "numbers",
        "pipeline stages at this coordinate; 0 without a pipeline",
        "layout.pipeline, layout.schedule",
        "docs/parallelism.md",
    ),
    "ranks.moment": Explanation(
        "name",
        "when the peak is: loss, head, backward, embedding, reduction; in a pipeline, of which stage",
        "the bytes at every moment of a step",
        TRACED,
    ),
    "ranks.peak_bytes": Explanation("bytes", "the sum of ranks.peak_bytes_by_kind", "ranks.peak_bytes_by_kind", TRACED),
    "ranks.peak_bytes_by_kind": Explanation(
        "bytes", "what is held at the moment that holds the most, by kind", "the run, --world", TRACED
    ),
    **{
        f"ranks.peak_bytes_by_kind.{kind}": Explanation("bytes", formula, "the run, --world", TRACED)
        for kind, formula in KINDS.items()
    },
    "ranks.margin_bytes": Explanation(
        "bytes",
        "gpu_bytes - peak_bytes",
        "gpu_bytes, ranks.peak_bytes",
        "plan/memory_plan.py; CUDA's context, NCCL and holes between allocations take 2 to 6 GB of it",
    ),
    "ranks.fits": Explanation(
        "true or false",
        "margin_bytes is at least 8 % of gpu_bytes",
        "ranks.margin_bytes, gpu_bytes",
        "plan/memory_plan.py, MARGIN: room for CUDA's context, NCCL and holes between allocations, 2 to 6 GB",
    ),
}
EXPLAINED: dict[str, Explanation] = {
    **MODEL,
    **MEMORY,
    **{key: Explanation(*row) for key, row in BUDGET_ROWS.items()},
    **{key: Explanation(*row) for key, row in ROWS.items()},
}
OPEN = ("defaults", "pruned", "pinned", "neighbours.change")  # tables whose keys differ from plan to plan


def explain(key: str) -> Explanation:
    """The explanation of a key; its last parts are enough, and mean the first key that ends with them.

    Raises UserError, with the nearest keys, for one that no plan has.
    """
    parents = [name for name in OPEN if key.startswith(f"{name}.")]
    ending = [name for name in EXPLAINED if name.endswith(f".{key}")]
    for name in (key, *parents, *ending):
        if name in EXPLAINED:
            return EXPLAINED[name]
    near = difflib.get_close_matches(key, EXPLAINED, n=3)
    remedy = f"did you mean {', '.join(near)}?" if near else "docs/plan.md lists the keys"
    raise UserError(f"no plan has a number {key!r}", where="minka plan explain", remedy=remedy)
