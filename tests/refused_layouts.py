"""Combinations that cannot be run, each with the setting to blame, its reason, and what would work."""

from typing import Any, NamedTuple


class Refused(NamedTuple):
    """A combination that cannot be run: the setting to blame, words of the reason, and overrides that mend it.

    The setting is one of [layout] unless it names its table.
    """

    sections: dict[str, dict[str, Any]]
    key: str
    why: str
    mended: dict[str, dict[str, Any]]


REFUSED = {
    "tensor and key/value heads": Refused(
        {"layout": {"tensor": 8}}, "tensor", "whole query and key/value heads", {"layout": {"tensor": 4}}
    ),
    "tensor and query heads": Refused(
        {"layout": {"tensor": 4}, "model": {"heads": 6, "kv_heads": 2}}, "tensor", "whole", {"layout": {"tensor": 2}}
    ),
    "tensor and feed-forward width": Refused(
        {"layout": {"tensor": 4}, "model": {"d_ff": 90}}, "tensor", "columns", {"layout": {"tensor": 2}}
    ),
    "tensor and vocabulary": Refused(
        {"layout": {"tensor": 4}, "model": {"vocab": 257}, "data": {"tokenizer": "bpe"}},
        "tensor",
        "rows",
        {"model": {"vocab": 260}},
    ),
    "context and sequence length": Refused(
        {"layout": {"context": 3}}, "context", "head and one from the tail", {"layout": {"context": 4}}
    ),
    "tensor and the tokens of a rank": Refused(
        {"layout": {"context": 1, "tensor": 4}, "data": {"seq_len": 62, "batch_tokens": 62 * 8}},
        "tensor",
        "share a sequence's tokens",
        {"layout": {"tensor": 2}},
    ),
    "pipeline and tied embeddings": Refused(
        {"layout": {"pipeline": 2}, "model": {"tied": True}}, "pipeline", "two stages", {"model": {"tied": False}}
    ),
    "one stage a rank in a schedule of two": Refused(
        {"layout": {"pipeline": 2, "schedule": "zbv", "stages_per_rank": 1}},
        "stages_per_rank",
        "2 stages",
        {"layout": {"stages_per_rank": 2}},
    ),
    "two stages a rank in a schedule of one": Refused(
        {"layout": {"pipeline": 2, "stages_per_rank": 2}},
        "stages_per_rank",
        "1 stage",
        {"layout": {"schedule": "interleaved"}},
    ),
    "one stage a rank interleaved": Refused(
        {"layout": {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 1}},
        "stages_per_rank",
        "at least 2 stages",
        {"layout": {"stages_per_rank": 2}},
    ),
    "more stages than layers": Refused(
        {"layout": {"pipeline": 8, "schedule": "dualpipev"}},
        "pipeline",
        "every stage needs a layer",
        {"layout": {"pipeline": 4}},
    ),
    "stages that do not add up": Refused(
        {"layout": {"pipeline": 2, "stages": "4,3"}},
        "stages",
        "the layers of each stage",
        {"layout": {"stages": "5,3"}},
    ),
    "stages that are too many": Refused(
        {"layout": {"pipeline": 2, "stages": "4,3,1"}}, "stages", "in the order", {"layout": {"stages": "4,4"}}
    ),
    "an empty stage": Refused(
        {"layout": {"pipeline": 2, "stages": "8,0"}}, "stages", "at least one", {"layout": {"stages": "7,1"}}
    ),
    "stages in words": Refused(
        {"layout": {"pipeline": 2, "stages": "half,half"}}, "stages", "at least one", {"layout": {"stages": ""}}
    ),
    "split backward with resharding": Refused(
        {"layout": {"pipeline": 2, "schedule": "dualpipev", "reshard": "always"}},
        "reshard",
        "wrong without an error",
        {"layout": {"reshard": "never"}},
    ),
    "split backward with compiled blocks": Refused(
        {"layout": {"pipeline": 2, "schedule": "zbv"}, "kernels": {"compile": True}},
        "schedule",
        "wrong without an error",
        {"kernels": {"compile": False}},
    ),
    "1f1b with few micro-batches": Refused(
        {"layout": {"pipeline": 4, "micro_batch": 4}},
        "schedule",
        "as many as there are stages",
        {"layout": {"micro_batch": 2}},
    ),
    "dualpipev with few micro-batches": Refused(
        {"layout": {"pipeline": 2, "schedule": "dualpipev", "micro_batch": 4}},
        "schedule",
        "as many as there are stages",
        {"layout": {"micro_batch": 2}},
    ),
    "interleaved with some numbers of micro-batches": Refused(
        {"layout": {"pipeline": 2, "schedule": "interleaved"}, "data": {"batch_tokens": 5 * 64}},
        "schedule",
        "multiple of 2",
        {"data": {"batch_tokens": 6 * 64}},
    ),
    "deepspeed with copies": Refused(
        {"layout": {"engine": "deepspeed", "replicate": 2}},
        "replicate",
        "no copies",
        {"layout": {"replicate": 1}},
    ),
    "deepspeed with a pipeline": Refused(
        {"layout": {"engine": "deepspeed", "pipeline": 2}}, "pipeline", "ZeRO", {"layout": {"engine": "fsdp"}}
    ),
    "deepspeed with context": Refused(
        {"layout": {"engine": "deepspeed", "context": 2}}, "context", "ZeRO", {"layout": {"context": 1}}
    ),
    "deepspeed with tensor": Refused(
        {"layout": {"engine": "deepspeed", "tensor": 2}}, "tensor", "already cut", {"layout": {"tensor": 1}}
    ),
    "moments offloaded by FSDP": Refused(
        {"layout": {"offload": "optimizer"}}, "offload", "together", {"layout": {"offload": "all"}}
    ),
    "weights offloaded that are not cut": Refused(
        {"layout": {"engine": "deepspeed", "zero_stage": 2, "offload": "all"}},
        "offload",
        "whole on the device",
        {"layout": {"zero_stage": 3}},
    ),
    "deepspeed in fp64": Refused(
        {"layout": {"engine": "deepspeed", "precision": "fp64"}}, "precision", "fp32", {"layout": {"precision": "fp32"}}
    ),
    "deepspeed with resharding": Refused(
        {"layout": {"engine": "deepspeed", "reshard": "never"}}, "reshard", "the stage", {"layout": {"reshard": "auto"}}
    ),
    "deepspeed with a time to reduce": Refused(
        {"layout": {"engine": "deepspeed", "reduce": "micro_batch"}},
        "reduce",
        "the stage",
        {"layout": {"reduce": "step"}},
    ),
    "a pipeline that reduces each micro-batch": Refused(
        {"layout": {"pipeline": 2, "reduce": "micro_batch"}}, "reduce", "its last", {"layout": {"reduce": "step"}}
    ),
    "compiled blocks under ZeRO stage 3": Refused(
        {"layout": {"engine": "deepspeed"}, "kernels": {"compile": True}},
        "zero_stage",
        "hooks",
        {"layout": {"zero_stage": 2}},
    ),
    "selective recomputation under ZeRO stage 3": Refused(
        {"layout": {"engine": "deepspeed", "recompute": "selective"}},
        "recompute",
        "hooks",
        {"layout": {"zero_stage": 2}},
    ),
    "deepspeed with bf16 weights or moments": Refused(
        {"layout": {"engine": "deepspeed"}, "optimizer": {"moments": "bf16"}},
        "optimizer.moments",
        "partitions of weights and moments are fp32",
        {"layout": {"engine": "fsdp"}},
    ),
    "bf16 weights or moments in fp64": Refused(
        {"layout": {"precision": "fp64"}, "optimizer": {"weights": "bf16"}},
        "optimizer.weights",
        "weights and moments too",
        {"layout": {"precision": "fp32"}},
    ),
    "bf16 weights that reduce each micro-batch": Refused(
        {"layout": {"reduce": "micro_batch"}, "optimizer": {"weights": "bf16"}},
        "reduce",
        "rounded again",
        {"layout": {"reduce": "step"}},
    ),
    "few micro-batches in a warm-up": Refused(
        {"layout": {"pipeline": 4}, "data": {"batch_warmup": [{"until_tokens": 640, "batch_tokens": 128}]}},
        "schedule",
        "as many as there are stages",
        {"layout": {"schedule": "gpipe"}},
    ),
}
