"""Tests that need a GPU: the variable-length kernels, nccl, bf16 under FSDP2, compiled blocks. `make gpu-check`."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from minka.benchmarks.training import our_step, peer_step, synthetic_batch
from minka.checkpoint.async_saver import AsyncSaver, Outcome
from minka.checkpoint.restore import restore_from
from minka.checkpoint.shard_file import StagingBuffer
from minka.checkpoint.write import SaveRequest
from minka.model.attention import attention, document_structure
from minka.parallel.mesh import start_mesh
from minka.parallel.pieces import piece_of
from minka.plan.flops import parameters
from minka.plan.layout import Layout
from minka.plan.ledger import read_ledger
from minka.plan.load_config import dump_toml, load_run
from minka.plan.run_folder import RunFolder
from minka.train.build_engine import build_engine
from minka.train.dry_run import dry_run
from tiny import tiny, train_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_the_demo_trains_as_a_command(tmp_path: Path) -> None:
    """First of all: the process that forks the ranks must not have touched the device."""
    places = [f"run.folder={tmp_path / 'runs'}", f"data.store={tmp_path / 'store'}"]
    subprocess.run([sys.executable, "-m", "minka", "train", "demo", *places], env=dict(os.environ), check=True)
    folder = RunFolder(tmp_path / "runs" / "demo")
    (start,) = [e for e in read_ledger(folder.ledger_file) if e["event"] == "start"]
    assert start["device"] == torch.cuda.get_device_name()
    assert folder.finished()


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_varlen_attention_is_masked_attention(kv_heads: int) -> None:
    documents = torch.zeros(2, 512, dtype=torch.int64)
    documents[0, 100:] = 1
    documents[0, 101:] = 2  # a document of one token
    documents[1, 300:] = 1
    shapes = [(2, 8, 512, 64), (2, kv_heads, 512, 64), (2, kv_heads, 512, 64)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    found = {}
    for name, dtype in (("varlen", torch.bfloat16), ("sdpa", torch.bfloat16), ("truth", torch.float32)):
        structure = document_structure(documents, varlen=name == "varlen").to(torch.device("cuda"), dtype)
        q, k, v = (x.to(dtype) for x in inputs)
        y = attention(q, k, v, structure)
        gradients = torch.autograd.grad(y.float().square().sum(), inputs)
        found[name] = [y.float(), *(g.float() for g in gradients)]
    for varlen, sdpa, truth in zip(*found.values(), strict=True):
        assert (varlen - truth).norm() <= 2 * (sdpa - truth).norm() + 1e-5 * truth.norm()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_bf16_training_follows_fp32(compiled: bool, recompute: str, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        config = tiny(
            tmp_path,
            run={"name": precision},
            layout={"precision": precision, "recompute": recompute},
            kernels={"compile": compiled and precision == "bf16"},
        )
        assert train_rank(config) == 0
        events = read_ledger(RunFolder.of(config).ledger_file)
        losses[precision] = [e["loss"] for e in events if e["event"] == "step"]
    for low, full in zip(losses["bf16"], losses["fp32"], strict=True):
        assert low == pytest.approx(full, rel=2e-2)


def test_bf16_on_nccl_follows_fp32_on_the_cpu(tmp_path: Path) -> None:
    """One rank each; on one rank only bf16 starts process groups."""
    config = tiny(tmp_path, run={"name": "gpu"}, layout={"precision": "bf16"})
    assert train_rank(config) == 0
    cpu, file = tiny(tmp_path, run={"name": "cpu"}, layout={"precision": "fp32"}), tmp_path / "cpu.toml"
    file.write_text(dump_toml(cpu))
    command = [sys.executable, "-m", "minka", "train", str(file), "--ranks", "1"]
    subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    found = [
        [(e["loss"], e["grad_norm"]) for e in read_ledger(RunFolder.of(c).ledger_file) if e["event"] == "step"]
        for c in (config, cpu)
    ]
    for low, full in zip(*found, strict=True):
        assert low == pytest.approx(full, rel=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offloaded_weights_are_trained_as_those_on_the_device(precision: str, tmp_path: Path) -> None:
    """One rank: in fp32 FSDP shards nothing and only fetches the weights. The run is saved, evaluated and resumed."""
    found = []
    for offload in ("none", "all"):
        for steps in (10, 20):
            sections: dict[str, Any] = {"run": {"name": offload, "max_steps": steps}, "eval": {"every_steps": 5}}
            config = tiny(tmp_path, **sections, layout={"precision": precision, "offload": offload})
            assert train_rank(config) == 0
        events = read_ledger(RunFolder.of(config).ledger_file)
        found.append([(e["loss"], e["grad_norm"]) for e in events if e["event"] == "step"])
    assert len(found[0]) == 20
    for here, away in zip(*found, strict=True):
        assert away == pytest.approx(here, rel=1e-4 if precision == "fp32" else 2e-2)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the deepspeed extra")
@pytest.mark.parametrize("stage", [2, 3])
def test_moments_that_deepspeed_offloads_are_those_on_the_device(stage: int, tmp_path: Path) -> None:
    """A scale or a refusal that the kernel reads before its copy has arrived would change the losses."""
    found = []
    for offload in ("none", "optimizer"):
        layout = {"engine": "deepspeed", "zero_stage": stage, "offload": offload}
        config = tiny(tmp_path, run={"name": f"{offload}-{stage}"}, layout=layout)
        assert train_rank(config) == 0
        events = read_ledger(RunFolder.of(config).ledger_file)
        found.append([(e["loss"], e["grad_norm"]) for e in events if e["event"] == "step"])
    for here, away in zip(*found, strict=True):
        assert away == pytest.approx(here, rel=2e-2)


def test_the_process_group_is_bound_to_the_device_of_the_rank() -> None:
    with start_mesh(Layout(precision="bf16")) as mesh:
        group: Any = torch.distributed.group.WORLD
        assert group.bound_device_id == mesh.device == torch.device("cuda", 0)


def test_the_staging_buffer_is_page_locked_and_not_rounded_up() -> None:
    state = {"model.w": piece_of(torch.randn(2**20 + 1, 3, device="cuda"))}
    for _ in range(2):  # what has been unlocked can be locked again
        staged = StagingBuffer(state, pinned=True)
        assert staged.buffer.is_pinned()
        assert staged.buffer.numel() < 1.01 * state["model.w"].local.nbytes
        staged.copy_in(state)
        torch.cuda.synchronize()
        del staged


def test_offloaded_weights_leave_room_on_the_device() -> None:
    small = ["data.seq_len=1024", "layout.micro_batch=2", "data.batch_tokens=4096", "data.batch_warmup=[]"]
    peaks, batch = {}, None
    for offload in ("none", "all"):
        config = load_run("dense-125m", [*small, f"layout.offload={offload}", "kernels.compile=false"]).config
        batch = batch or synthetic_batch(config.model.vocab, 4, 1024)
        with start_mesh(config.layout) as mesh:
            engine, _ = build_engine(config, mesh)
            kept = {piece.local.device.type for piece in engine.tensors().values()}
            assert kept == {"cuda" if offload == "none" else "cpu"}
            peaks[offload] = peak_of(our_step(engine, batch, config, batch.target_count))
            del engine
        torch.cuda.empty_cache()
    freed = (peaks["none"] - peaks["all"]) / parameters(config.model)
    print(f"{torch.cuda.get_device_name()}: {freed:.1f} bytes a parameter less on the device")
    assert freed > 10  # weights and both moments are 12


def test_a_dry_run_predicts_what_the_allocator_of_the_device_counts() -> None:
    small = ["data.seq_len=2048", "layout.micro_batch=4", "data.batch_tokens=8192", "data.batch_warmup=[]"]
    config = load_run("dense-125m", [*small, "kernels.compile=false"]).config
    predicted = dry_run(config, 1, 0)
    batch = synthetic_batch(config.model.vocab, 4, 2048)
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        real = peak_of(our_step(engine, batch, config, batch.target_count))
    print(f"{torch.cuda.get_device_name()}: {predicted.memory.total / real:.3f} of {real / 2**30:.2f} GiB")
    assert predicted.memory.total == pytest.approx(real, rel=0.1)  # rounding up, cuBLAS, padding


def test_a_step_of_dense_125m_is_faster_than_that_of_transformers() -> None:
    config = load_run("dense-125m", ["data.seq_len=2048", "layout.micro_batch=8", "kernels.compile=true"]).config
    batch = synthetic_batch(config.model.vocab, 8, 2048)
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        ours = our_step(engine, batch, config, batch.target_count)
        theirs = peer_step(config, batch, compiled=True, device="cuda", dtype=torch.bfloat16)
        ratios = [seconds(theirs) / seconds(ours) for _ in range(5)]
    rate = batch.tokens.numel() / seconds(ours)
    print(f"{torch.cuda.get_device_name()}: {rate:,.0f} tokens/s, {sorted(ratios)[2]:.2f}x transformers")
    assert sorted(ratios)[2] > 1.0


def test_a_save_during_training_holds_the_tensors_as_they_were(tmp_path: Path) -> None:
    """256 MB on the device, changed as soon as the save has its copy; how long the training waited is printed."""
    with start_mesh(Layout()) as mesh:
        state = {f"model.{i}": piece_of(torch.randn(1024, 4096, device="cuda")) for i in range(16)}
        truth = {name: piece.local.clone() for name, piece in state.items()}
        saver, a = AsyncSaver(tmp_path, mesh, 2), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        outcomes: list[Outcome] = []
        for step in (1, 2):  # the first one makes the staging buffer
            for name, piece in state.items():
                piece.local.copy_(truth[name])
            saver.save(SaveRequest(step, {"step": step}), state)
            for _ in range(50):
                a @ a  # a forward and backward pass
            saver.wait_for_copy()
            for piece in state.values():
                piece.local.zero_()  # the update
            ended = saver.wait()
            assert ended is not None
            assert not ended.error
            outcomes.append(ended)
        outcome = outcomes[-1]
        print(f"waited {outcome.stall_seconds * 1e3:.1f} ms of {outcome.total_seconds * 1e3:.0f} ms, the end included")
        assert restore_from(outcome.path, state, mesh) == {"step": 2}
        assert all(torch.equal(piece.local, truth[name]) for name, piece in state.items())


def peak_of(step: Any) -> int:
    """Return the peak of allocated bytes in the second step."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def seconds(step: Any, steps: int = 10) -> float:
    """Return the seconds of a step, the wait for the device included."""
    step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps
