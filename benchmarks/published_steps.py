"""Published measurements as the planner sees them: steps of llm-foundry and Megatron-LM on H100s."""

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from minka.plan.calibrate import Measured
from minka.plan.errors import UserError
from minka.plan.flops import Shape, training_flops_per_token
from minka.plan.layout import Layout
from minka.plan.machine import Machine, find_machine
from minka.plan.rates import ATTENTION_SHARE
from minka.plan.step_work import Job, Part

GOLDENS = Path(__file__).resolve().parent.parent / "tests/goldens"
MPT_VOCAB, MEGATRON_VOCAB, MEGATRON_SEQ_LEN = 50_368, 131_072, 4096


class Published(NamedTuple):
    """A published step."""

    model: str
    gpus: int
    mfu: float  # by the publisher's own count
    step: Measured


def rows_of(name: str) -> list[dict[str, str]]:
    """Return the rows of a table. Raises UserError where the source tree is not there."""
    file = GOLDENS / name
    try:
        with file.open(encoding="utf-8") as lines:
            return list(csv.DictReader(lines))
    except OSError as error:
        remedy = "run it in a clone of the repository: published figures are not installed"
        raise UserError("cannot be read", where=str(file), why=str(error), remedy=remedy) from error


def h100(attention: str) -> Machine:
    """Return an H100 whose attention is that of a kernel of ATTENTION_SHARE."""
    machine = find_machine("H100-SXM")
    return replace(machine, rates=replace(machine.rates, attention=ATTENTION_SHARE[attention]))


def mpt_steps() -> Iterator[Published]:
    """Yield llm-foundry's: FSDP that gathers each block twice, gradients reduced in bf16, nothing compiled.

    Their attention is FlashAttention's first algorithm, in Triton (`attn_impl: triton`, for ALiBi).
    """
    for row in rows_of("mpt_h100_bf16_throughput.csv"):
        layers, d_model, heads, length, gpus = (
            int(row[key]) for key in ("layers", "d_model", "heads", "seq_len", "gpus")
        )
        width = {"kv_heads": heads, "head_dim": d_model // heads, "d_ff": 4 * d_model, "vocab": MPT_VOCAB}
        kind = {"tied": True, "biases": "all", "mlp_matrices": 2, "learned_positions": length}
        shape = Shape(layers=layers, d_model=d_model, heads=heads, **width, **kind)  # type: ignore[arg-type]
        rows, count = int(row["micro_batch"]), int(row["grad_accum"])
        recompute = "block" if row["activation_checkpointing"] == "True" else "none"
        part = Part(shape, length, micro_batch=rows, recompute=recompute, fused=False)
        layout = Layout(shard=gpus, micro_batch=rows, recompute="block" if recompute == "block" else "none")
        job = Job(part, layout, count, (layers,), freed=True, reduce_each=True, reduce_bytes=2)
        seconds = rows * length * count / float(row["tokens_per_second_per_gpu"])
        mfu = float(row["mfu_percent_6N_plus_12Lds"]) / 100
        yield Published(row["model"], gpus, mfu, Measured(job, seconds))


def megatron_steps() -> Iterator[Published]:
    """Yield Megatron-LM's: weights kept whole over data ranks, everything that can overlap does.

    What the table does not say is assumed: micro-batches of one sequence in a pipeline, of all four without one; stages
    of one layer; gradients reduced in fp32.
    """
    for row in rows_of("megatron_h100_bf16_throughput.csv"):
        layers, d_model, tensor, pipeline, data, batch = (
            int(row[key]) for key in ("layers", "d_model", "tensor", "pipeline", "data", "global_batch")
        )
        heads = d_model // 128
        width = {"heads": heads, "kv_heads": heads, "head_dim": 128, "d_ff": 4 * d_model, "vocab": MEGATRON_VOCAB}
        shape = Shape(layers=layers, d_model=d_model, mlp_matrices=2, **width)  # type: ignore[arg-type]
        rows = batch // data if pipeline == 1 else 1
        stages = layers if pipeline > 1 else 1
        ways = {"tensor": tensor, "pipeline": pipeline, "shard": data, "micro_batch": rows}
        layout = Layout(schedule="interleaved" if pipeline > 1 else "1f1b", stages_per_rank=stages // pipeline, **ways)  # type: ignore[arg-type]
        part = Part(shape, MEGATRON_SEQ_LEN, tensor=tensor, micro_batch=rows, tensor_overlaps=True)
        job = Job(part, layout, batch // data // rows, (layers // stages,) * stages)
        gpus, rate = tensor * pipeline * data, float(row["tflops_per_gpu"]) * 1e12
        flops = batch * MEGATRON_SEQ_LEN * training_flops_per_token(shape, MEGATRON_SEQ_LEN, "megatron")
        yield Published(row["model"], gpus, rate / 989e12, Measured(job, flops / (rate * gpus)))
