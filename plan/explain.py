"""Where each number of a plan comes from: its unit, its formula, what goes in, and who says so. By key of the JSON."""

import difflib
from typing import NamedTuple

from minka.plan.errors import UserError
from minka.plan.flops import FORMULAS


class Explanation(NamedTuple):
    """Of one key; a key below another is written with a dot."""

    unit: str
    formula: str
    inputs: str
    source: str


SOURCES: dict[str, str] = {
    "causal": "counted; equal to what torch counts on the model, but for the masked half of attention",
    "palm": "Chowdhery et al., arXiv:2204.02311, appendix B",
    "6n": "Kaplan et al., arXiv:2001.08361, section 2.1",
    "megatron": "Narayanan et al., arXiv:2104.04473, section 3.3",
}
TRACED = "within 3 % of the dry run, which traces the step itself (tests/train/test_memory_plan.py)"
KINDS = {
    "weights": "this rank's shards, 2 or 4 bytes an element",
    "gradients": "whole ones that are added up, buffers they are reduced in, and reduced shards",
    "optimizer": "two moments for each element of this rank's shards",
    "activations": "saved for backward: all of a block, its products (selective), or its input (block)",
    "gathered": "FSDP's whole weights, and what context and tensor groups gather",
    "logits": "a chunk, in fp32 and in the compute dtype",
    "workspace": "between two operations",
}
COUNTED = "counted; equal to the model that transformers builds, for every family that is read"
SIZES = "L layers, d model width, h query heads, k key/value heads, e head width, f feed-forward width, V vocabulary"
EXPLAINED: dict[str, Explanation] = {
    "parameters": Explanation(
        "weights", "L(2d(h + k)e + 3df + norms and biases) + d + dV (2dV where the head is not tied)", SIZES, COUNTED
    ),
    "parameters_embedding": Explanation(
        "weights", "dV, 2dV where the head is not tied, and d for each learned position", SIZES, COUNTED
    ),
    "parameters_non_embedding": Explanation(
        "weights", "parameters - parameters_embedding", "both", "the N of Kaplan et al. (arXiv:2001.08361)"
    ),
    "parameters_active": Explanation(
        "weights", "parameters less those of experts that a token is not sent to", f"{SIZES}, experts", COUNTED
    ),
    **{
        f"peak_bytes_by_kind.{kind}": Explanation("bytes", formula, "docs/plan.md", TRACED)
        for kind, formula in KINDS.items()
    },
    "peak_bytes": Explanation("bytes", "the sum of peak_bytes_by_kind at the largest moment", "docs/plan.md", TRACED),
    "moment": Explanation(
        "name", "loss, head, backward, embedding, reduction; in a pipeline, of which stage", "all of them", TRACED
    ),
    "stages": Explanation(
        "numbers", "pipeline stages at this coordinate; 0 without a pipeline", "layout", "the layout"
    ),
    "gpu_bytes": Explanation("bytes", "of the GPU's data sheet", "--gpu", "plan/hardware.py"),
    "margin_bytes": Explanation(
        "bytes",
        "gpu_bytes - peak_bytes",
        "both",
        "what the context of CUDA, NCCL and holes between allocations may take: 2 to 6 GB",
    ),
    "fits": Explanation("true or false", "margin_bytes is at least 8 % of gpu_bytes", "both", "the same"),
    **{
        f"training_flops_per_token.{name}": Explanation(
            "FLOPs; a multiplication and an addition are two",
            formula,
            f"{SIZES}, s tokens that attention sees",
            formula,
        )
        for name, formula in FORMULAS.items()
    },
}


def explain(key: str) -> Explanation:
    """The explanation of a key. Raises UserError, with the nearest keys, for one that no plan has."""
    if key in EXPLAINED:
        return EXPLAINED[key]
    below = [name for name in EXPLAINED if name.startswith(f"{key}.")]
    near = below or difflib.get_close_matches(key, EXPLAINED, n=3) or list(EXPLAINED)
    raise UserError(f"no plan has a number {key!r}", where="minka plan explain", remedy=f"known: {', '.join(near)}")
