"""Folders of runs whose ledgers say how long their steps took."""

import math
from pathlib import Path

from minka.plan.atomic import write_json
from minka.plan.ledger import Ledger
from minka.plan.load_config import load_run
from minka.plan.loss_laws import EPOCH
from minka.plan.outlook import planned_of
from minka.plan.run_folder import RunFolder


def written_run(folder: Path, name: str, seconds: float, device: str, *overrides: str, readings: int = 6) -> str:
    """A run's folder as training leaves it, whose steps took `seconds` each."""
    config = load_run("llama3-8b", [f"run.name={name}", f"run.folder={folder}", *overrides]).config
    run = RunFolder.of(config)
    run.create(config, {})
    ledger = Ledger(run.ledger_file)
    start = {"ranks": 8, "device": device, "config": config.model_dump(mode="json")}
    ledger.append("start", step=0, tokens=0, **start)
    batch = config.data.batch_tokens
    for number in range(1, readings + 1):
        speed = batch / (seconds * (3 if number == 1 else 1 + 0.001 * number))
        ledger.append("step", step=number, tokens=number * batch, tokens_per_second=speed)
    ledger.close()
    return str(run.path)


def table_of_runs(path: Path, count: int = 30) -> str:
    """A table of runs whose losses are those of a published law, within a percent."""
    rows = ["params,tokens,loss"]
    for number in range(count):
        size, tokens = 1e6 * 4 ** (number % 5), 3e7 * 5 ** (number % 7)
        rows.append(f"{size},{tokens},{EPOCH.loss(size, tokens) * (1 + 0.01 * ((7 * number) % 11 - 5) / 5)}")
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def learning_run(folder: Path, name: str, *overrides: str, share: float = 0.5, ends: float = 2.2) -> str:
    """A run's folder in the middle of training: its loss falls, and would end at `ends`."""
    words = [f"run.name={name}", f"run.folder={folder}", "run.max_tokens=none", "run.max_steps=1000"]
    words += ["schedule.unit=steps", "schedule.warmup=10", "schedule.decay=0", "data.batch_warmup=[]", *overrides]
    config = load_run("dense-125m", words).config
    run = RunFolder.of(config)
    run.create(config, {})
    ledger = Ledger(run.ledger_file)
    ledger.append("start", step=0, tokens=0, ranks=1, device="H100", config=config.model_dump(mode="json"))
    for step in range(1, round(1000 * share) + 1):
        loss = ends * (0.5 + 0.5 * (step / 1000) ** -0.3) * (1 + 0.01 * ((7 * step) % 11 - 5) / 5)
        rate = config.optimizer.learning_rate
        tokens = step * config.data.batch_tokens
        ledger.append("step", step=step, tokens=tokens, loss=loss, learning_rate=rate, tokens_per_second=1e6)
    ledger.close()
    return str(run.path)


def planned_run(folder: Path, name: str, loss: float, *overrides: str) -> str:
    """The folder of a run that ended at 2.2 nats a token, for which `loss` was planned."""
    words = [f"plan.loss={loss}", f"plan.loss_low={loss - 0.05}", f"plan.loss_high={loss + 0.05}", "plan.law=epoch"]
    path = Path(learning_run(folder, name, *words, *overrides, share=1.0))
    run = RunFolder(path)
    config = load_run(str(path)).config
    write_json(path / "plan.json", planned_of(config, 8, "H100-SXM"))
    ledger = Ledger(run.ledger_file)
    ledger.append("stop", step=1000, tokens=1000 * config.data.batch_tokens, reason="done")
    ledger.close()
    scored = path / "evals/step-00001000"
    scored.mkdir(parents=True)
    bits = 2.2 / math.log(2) * 1000 / 4000
    write_json(
        scored / "heldout@1.json",
        {"tokens": 1000, "bytes": 4000, "document_tokens": 1000, "scores": {"bits_per_byte": bits}},
    )
    return str(path)
