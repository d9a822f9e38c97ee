"""The state of a run: what is read of its folder, from the end of its ledger, and how little."""

import json
from pathlib import Path
from typing import Any

import pytest

from minka.plan import run_state
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.ledger import Ledger, parse_event
from minka.plan.load_config import dump_toml, load_run
from minka.plan.resume_rules import decide
from minka.plan.run_folder import RunFolder
from minka.plan.run_state import Position, RunState, read_run_state

DEEP = "[" * 100_000
STEPS = 200_000


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that was created and not started."""
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    RunFolder.of(config).create(config, {})
    return RunFolder.of(config)


def read(folder: RunFolder, *checkpoints: int, damaged: tuple[int, ...] = (), newest: int = 0) -> RunState:
    """The state with these checkpoints; `newest` has the highest number, where it is not the highest step."""
    read.opened = []  # type: ignore[attr-defined]

    def header(step: int) -> tuple[int, Position] | None:
        read.opened.append(step)  # type: ignore[attr-defined]
        return None if step in damaged else (10**6 if step == newest else step, Position(step, step, 10 * step))

    return read_run_state(folder, checkpoints, header)


def opened() -> list[int]:
    """The manifests that the last `read` opened."""
    return read.opened  # type: ignore[attr-defined]


def log(folder: RunFolder, *events: tuple[str, int] | tuple[str, int, dict[str, Any]]) -> None:
    """Events at the end of the run's ledger: kind, step, other fields."""
    ledger = Ledger(folder.ledger_file)
    for kind, step, *fields in events:
        ledger.append(kind, step=step, tokens=10 * step, **(fields[0] if fields else {}))
    ledger.close()


def start(config: RunConfig, step: int = 0) -> tuple[str, int, dict[str, Any]]:
    return "start", step, {"config": config.model_dump(mode="json")}


def test_starts_and_saves_count_since_the_run_last_restarted(run: RunFolder) -> None:
    config = run.config()
    assert read(run) == RunState()
    log(run, ("start", 0), ("step", 1, {"seconds": {"save": 0.1}}), ("save", 1))
    state = read(run)
    assert (state.begun, state.started, state.last_save, state.started_with) == (True, True, 1, None)  # as version 1
    assert state.config == config  # of run.toml
    log(run, start(config, 1), ("step", 2), ("save", 2), ("step", 3))
    assert (read(run).last_save, read(run).started_with) == (2, config)
    log(run, ("restart", 0))
    state = read(run)
    assert (state.started, state.last_save, state.started_with) == (False, None, config)
    log(run, start(config))
    with run.ledger_file.open("a") as file:
        file.write('{"event": "save", "time"')  # cut off by a crash
    assert (read(run).started, read(run).last_save) == (True, None)


def test_a_run_toml_edited_by_hand_does_not_hide_a_change(run: RunFolder) -> None:
    config = run.config()
    log(run, start(config))
    where = str(run.path.parent)
    edited = load_run("demo", [f"run.folder={where}", "run.seed=1", "schedule.warmup=3"]).config
    run.config_file.write_text(dump_toml(edited))
    with pytest.raises(UserError, match=r"run\.seed = 1 \(was 0\)") as caught:
        decide(read(run), edited, str(run.path))
    assert "set run.seed back" in caught.value.remedy
    run.config_file.write_text("not TOML")
    assert (read(run).config, read(run).in_file) == (config, None)


def test_what_may_change_is_allowed_and_counts_once_training_starts(run: RunFolder) -> None:
    config = run.config()
    log(run, start(config))
    where = f"run.folder={run.path.parent}"
    other = load_run("demo", [where, "layout.micro_batch=4", "tracking.log_every=1", "guard.hang_seconds=9"]).config
    changed = decide(read(run), other, str(run.path)).changed
    assert set(changed) == {"layout.micro_batch", "tracking.log_every", "guard.hang_seconds"}
    run.training_starts(other)
    assert set(decide(read(run), other, str(run.path)).changed) == set(changed)  # until a start is recorded
    log(run, start(other))
    assert decide(read(run), other, str(run.path)).changed == {}


def test_lines_that_are_not_events_are_passed_over(run: RunFolder) -> None:
    config = run.config()
    log(run, start(config))
    with run.ledger_file.open("a") as file:
        file.write(DEEP + '\n{"event": ["start"], "time": 0, "step": 0, "tokens": 0}\n' + DEEP.replace("[", '{"a":'))
    log(run, ("save", 3))
    assert (read(run).started_with, read(run).last_save) == (config, 3)


def test_a_start_event_that_this_version_cannot_parse_is_reported_and_not_replaced_by_an_older_one(
    run: RunFolder,
) -> None:
    config = run.config()
    newer = config.model_dump(mode="json")
    newer["optimizer"]["momentum_of_tomorrow"] = 1
    log(run, start(config), ("save", 1))
    at = run.ledger_file.stat().st_size
    log(run, ("start", 1, {"config": newer}), ("step", 2))
    state = read(run, 1)
    assert state.started_with is None
    with pytest.raises(UserError) as caught:
        decide(state, config, str(run.path))
    assert f"{run.ledger_file}: the start event at byte {at:,}" in caught.value.what
    assert "optimizer.momentum_of_tomorrow" in caught.value.what
    assert f"minka train {run.path} --from-scratch" in caught.value.remedy
    decide(state, config, str(run.path), from_scratch=True)
    log(run, ("restart", 0))
    assert read(run).unreadable_start == ""  # nothing depends on it any more


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"seed": 0', b'"seed": \x00'),
        (b'"event"', b'"evenu"'),
        (b"\n", b" "),  # joined to the line after it
        (b'"config": {', b'"config": [{'),
    ],
)
def test_a_damaged_start_event_is_not_replaced_by_an_older_one(old: bytes, new: bytes, run: RunFolder) -> None:
    config = run.config()
    other = load_run("demo", [f"run.folder={run.path.parent}", "schedule.warmup=3"]).config
    log(run, start(config), ("save", 1))
    at = run.ledger_file.stat().st_size
    log(run, start(other, 1), ("step", 2))
    raw = run.ledger_file.read_bytes()
    run.ledger_file.write_bytes(raw[:at] + raw[at:].replace(old, new, 1))
    with pytest.raises(UserError, match=f"start event at byte {at:,} cannot be read: the line is damaged"):
        decide(read(run, 1), config, str(run.path))


def test_a_start_event_that_a_crash_cut_off_changed_nothing(run: RunFolder) -> None:
    config = run.config()
    log(run, start(config), ("save", 1))
    raw = run.ledger_file.read_bytes()
    with run.ledger_file.open("ab") as file:
        file.write(raw[: raw.index(b"seed")])
    log(run, ("restore", 1))  # the next session, which ended before its start event
    assert (read(run, 1).started_with, read(run, 1).unreadable_start) == (config, "")


def test_the_newest_checkpoint_is_that_of_the_last_save_and_its_manifest_alone_is_opened(run: RunFolder) -> None:
    log(run, start(run.config()), *((kind, step) for step in (5, 10, 15) for kind in ("step", "save")), ("step", 16))
    state = read(run, 5, 10, 15)
    assert (state.position, state.newest, opened()) == (Position(15, 15, 150), 15, [15])


def test_a_save_whose_event_was_lost_is_found_by_the_numbers_in_the_manifests(run: RunFolder) -> None:
    log(run, start(run.config()), ("save", 5), ("save", 10), ("step", 15))
    state = read(run, 5, 10, 15)
    assert (state.position, state.last_save, state.newest) == (Position(15, 15, 150), 10, 15)
    assert opened() == [10, 15]
    assert read(run, 5, 15).newest == 15  # the last save is gone


def test_a_checkpoint_of_an_abandoned_lineage_is_not_the_newest(run: RunFolder) -> None:
    log(run, start(run.config()), ("save", 5), ("save", 10), ("restore", 5), ("save", 8))
    state = read(run, 5, 8, 10, newest=8)
    assert (state.last_save, state.position) == (8, Position(8, 8, 80))
    assert (read(run, 5, 8).newest, opened()) == (8, [8])


def test_a_newest_manifest_that_cannot_be_read_leaves_the_order_to_the_restore(run: RunFolder) -> None:
    log(run, start(run.config()), ("save", 5), ("save", 10))
    state = read(run, 5, 10, damaged=(10,))
    assert (state.position, state.newest, state.last_save) == (Position(5, 5, 50), None, 10)
    state = read(run, 5, 10, 15, damaged=(15,))  # a crash between its save and the event; and then the disk
    assert (state.position, state.newest) == (Position(10, 10, 100), None)
    assert read(run, 5, 10, damaged=(5, 10)).position is None


def test_an_evaluation_of_the_newest_checkpoint_is_known_with_the_tokens_before_it(run: RunFolder) -> None:
    log(run, start(run.config()), ("step", 4), ("step", 5), ("save", 5), ("eval", 5), ("step", 9), ("step", 10))
    log(run, ("save", 10), ("step", 11))
    state = read(run, 5, 10)
    assert (state.evaluated, state.tokens_before) == (False, 90)
    assert read(run, 5, 10, damaged=(10,)).evaluated  # the run trained on after it
    log(run, ("eval", 10))
    assert read(run, 5, 10).evaluated
    log(run, ("restore", 5))
    assert read(run, 5).evaluated
    log(run, ("step", 10), ("save", 10))
    assert not read(run, 5, 10).evaluated  # the evaluation before was of the abandoned lineage


def test_a_state_is_outdated_when_ledger_or_checkpoints_have_changed(run: RunFolder) -> None:
    log(run, start(run.config()), ("save", 5))
    state = read(run, 5)
    assert state.is_current(run, [5])
    assert not state.is_current(run, [5, 10])
    log(run, ("step", 6))
    assert not state.is_current(run, [5])


@pytest.mark.parametrize("saved", [True, False])
def test_of_a_long_ledger_only_the_events_that_count_are_parsed(
    saved: bool, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its start is all of its lines back. To parse each line of a million steps would take many seconds."""
    log(run, start(run.config()), *([("save", STEPS - 100)] if saved else []))
    fields: dict[str, Any] = {
        "loss": 2.345678901234567,
        "z_loss": 1e-5,
        "grad_norm": 0.456,
        "learning_rate": 3e-4,
        "target_count": 9,
    }
    fields |= {"seconds": {"data": 1e-4, "compute": 0.123456789, "save": 0.0, "eval": 0.0}, "memory_bytes": 2**33}
    rest = json.dumps({**fields, "tokens_per_second": 123456.789012, "mfu": 0.4123456789, "peak": "x" * 60})[1:]
    with run.ledger_file.open("a") as file:
        file.writelines(
            f'{{"event": "step", "time": 1700000000.123, "step": {step}, "tokens": {10 * step}, {rest}\n'
            for step in range(1, STEPS + 1)
        )
    if saved:
        log(run, ("save", STEPS), ("eval", STEPS))
    parsed: list[bytes] = []

    def noted(line: bytes) -> dict[str, Any] | None:
        parsed.append(line)
        return parse_event(line)

    monkeypatch.setattr(run_state, "parse_event", noted)
    state = read(run, *([STEPS - 100, STEPS] if saved else []))
    assert len(parsed) < 10
    assert state.started
    assert (state.last_save, state.evaluated, state.tokens_before) == (
        (STEPS, True, 10 * (STEPS - 1)) if saved else (None, False, 0)
    )
