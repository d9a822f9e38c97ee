"""What a run writes when asked to: trackers, traces, layer statistics; and the ledger's own fields."""

import json
from pathlib import Path

import pytest

from commands import minka, written
from minka.model.transformer import Transformer
from minka.plan.errors import ExitStatus, UserError
from minka.plan.ledger import Ledger, read_ledger
from minka.plan.run_folder import RunFolder
from minka.train.command import parse_window
from minka.train.layer_stats import layer_of, layers_of
from ranks import on_ranks
from tiny import tiny, train_rank

STEP_FIELDS = {"loss", "grad_norm", "learning_rate", "tokens_per_second", "seconds", "memory_bytes", "mfu"}


def test_a_run_writes_ledger_trackers_details_and_a_trace(tmp_path: Path) -> None:
    tracking = {"wandb": "offline", "tensorboard": True, "detail_every": 10}
    config = tiny(tmp_path, tracking=tracking, eval={"every_tokens": 3000, "prompts": ["the "]})
    done = minka("train", str(written(config)), "--profile", "3:5", "--json", "--ranks", "2")
    assert done.returncode == ExitStatus.DONE, done.stderr
    folder = RunFolder.of(config)
    assert list((folder.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert list((folder.logs / "tensorboard").glob("events.out.tfevents.*"))
    spans = {e["name"] for e in json.loads((folder.logs / "trace-00001.json").read_text())["traceEvents"]}
    assert {name for name in spans if name.startswith("step ")} == {"step 4", "step 5"}
    events = list(read_ledger(folder.ledger_file))
    steps = [e for e in events if e["event"] == "step"]
    assert set(steps[0]) >= STEP_FIELDS | {"event", "time", "step", "tokens"}
    assert set(steps[0]["seconds"]) == {"data", "compute", "save", "eval"}
    assert steps[0]["mfu"] is None  # no peak is known for a CPU
    detail = [e for e in events if e["event"] == "detail"]
    assert [e["step"] for e in detail] == [1, 10, 20]
    assert set(detail[0]["grad_norm"]) == {"embedding", "blocks.0", "blocks.1", "norm", "head"}
    total = sum(norm**2 for norm in detail[0]["grad_norm"].values()) ** 0.5
    assert total == pytest.approx(steps[0]["grad_norm"], rel=1e-5)
    evaluated = [e["step"] for e in events if e["event"] == "eval"]
    assert evaluated == [13, 20]  # the first steps to end past 3,000 and 6,000 tokens; the second is the last
    last = json.loads((folder.evals / "step-00000020" / "heldout@1.json").read_text())
    assert last["samples"][0]["prompt"] == "the "
    assert json.loads(done.stdout)["bits_per_byte"] == last["scores"]["bits_per_byte"]


@pytest.mark.parametrize("ranks", [2])
def test_details_are_those_of_one_rank(ranks: int, tmp_path: Path) -> None:
    found = []
    for name, count in (("alone", 1), ("together", ranks)):
        config = tiny(
            tmp_path, run={"name": name, "max_steps": 3}, schedule={"warmup": 0}, tracking={"detail_every": 3}
        )
        on_ranks(train_rank, count, config)
        found.append([e for e in read_ledger(RunFolder.of(config).ledger_file) if e["event"] == "detail"])
    for alone, together in zip(*found, strict=True):
        for kind in ("grad_norm", "update_ratio"):
            assert together[kind] == pytest.approx(alone[kind], rel=1e-4)


def test_every_parameter_belongs_to_a_layer_that_has_weights(tmp_path: Path) -> None:
    for tied in (False, True):
        model = tiny(tmp_path, model={"tied": tied}).model
        names = [name for name, _ in Transformer(model).named_parameters()]
        assert list(dict.fromkeys(map(layer_of, names))) == layers_of(model)


@pytest.mark.parametrize("window", ["3", "5:3", "a:b", "3:3", "-1:2"])
def test_a_malformed_window_is_refused(window: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_window(window, 100)
    assert caught.value.where == "--profile"


def test_a_ledger_keeps_floats_exactly_and_survives_a_cut_line(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    ledger = Ledger(file, clock=lambda: 12.25)
    ledger.append("step", step=1, tokens=2, loss=0.1 + 0.2, grad_norm=float("inf"), seconds={"data": float("nan")})
    ledger.close()
    with file.open("a") as torn:
        torn.write('{"event": "st')
    again = Ledger(file)
    again.append("stop", step=1, tokens=2, reason="done")
    again.close()
    one, two = read_ledger(file)
    assert (one["loss"], one["grad_norm"], one["time"]) == (0.1 + 0.2, float("inf"), 12.25)
    assert one["seconds"]["data"] != one["seconds"]["data"]
    assert two["event"] == "stop"
    with pytest.raises(ValueError, match="stepp"):
        Ledger(file).append("stepp", step=1, tokens=2)
