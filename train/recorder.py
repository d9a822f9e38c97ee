"""Records a run: ledger, trackers, console, checkpoints, evaluations, samples."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import BinaryIO

from torch import Tensor

from minka.checkpoint.async_saver import AsyncSaver, Outcome
from minka.checkpoint.write import SaveRequest
from minka.data.batch import PADDING
from minka.data.token_store import Split, TokenStore
from minka.data.verify import checked_split
from minka.eval.bits_per_byte import Scores, bits_per_byte
from minka.eval.continue_prompts import continue_prompts
from minka.eval.result_file import SUITE, write_result
from minka.launch.supervisor_link import SupervisorLink
from minka.parallel.engine import Scorer
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece
from minka.plan.atomic import writing
from minka.plan.config import RunConfig
from minka.plan.console_output import lost_output
from minka.plan.errors import ExitStatus, UserError
from minka.plan.guard import judge
from minka.plan.ledger import Ledger
from minka.plan.read_file import reading
from minka.plan.retention import permanent
from minka.plan.run_folder import RunFolder
from minka.plan.scores import BITS_PER_BYTE, caveat
from minka.train.console import Console
from minka.train.metrics import Metrics, StepRecord, Stopwatch, interval_numbers, memory_bytes
from minka.train.rewind import go_back_from
from minka.train.state import State, manifest_state, random_state
from minka.train.trackers import Tracker, start_trackers


class Recorder:
    """One on each rank, since judging, saving and evaluating are collective. Only rank 0's writes and prints."""

    def __init__(
        self, config: RunConfig, mesh: Mesh, store: TokenStore, supervisor: SupervisorLink, *, as_json: bool
    ) -> None:
        self.config, self.mesh, self.store, self.supervisor = config, mesh, store, supervisor
        self.folder, settings = RunFolder.of(config), config.checkpoint
        # First, because it is collective: what follows may fail on rank 0 alone.
        self._saver = AsyncSaver(self.folder.checkpoints, mesh, settings.keep, asynchronous=settings.asynchronous)
        self.trackers: list[Tracker] = []  # once it is known where training starts
        with writing(self.folder.ledger_file):
            self.ledger = Ledger(self.folder.ledger_file) if mesh.is_first else None
        self.lineage = self.folder.lineage() if mesh.is_first else []
        self.run_id = self.folder.run_id() if mesh.is_first else ""
        self.console = Console(config, speaks=mesh.is_first, as_json=as_json)
        self.last_saved = State(step=-1)
        self.accepted = State()  # after the last accepted step, whose weights the engine has: refused ones change none
        self.save_waits = False  # a save is due, and waits until a step is accepted
        self._stays = False  # and it is permanent
        self.refusal = ""  # why the run must stop
        self.last: StepRecord | None = None
        self.tokens_per_second: float | None = None
        self.scores: Scores | None = None
        self.evaluated_at = self._evaluation_tried_at = -1
        self._checked: list[tuple[int, int, int]] = []  # times, sizes and numbers of the validation files
        self.refused_steps = 0
        self._ledger_writes = True
        self._failed_reports: set[str] = set()
        self._samples: BinaryIO | None = None

    def open_reports(self, state: State) -> None:
        """Open the file of sample ids and the trackers; the next numbers are those of the step after `state`."""
        if self.config.tracking.record_samples:
            with self._optional("samples"):
                self._samples = (self.folder.logs / f"samples-{self.mesh.rank:05d}.jsonl").open("ab", buffering=0)
        if self.mesh.is_first:
            self.trackers = start_trackers(self.config, self.folder, state.step)

    def event(self, event: str, state: State, **fields: object) -> None:
        """Write one line of the ledger. A full disk does not end the run: the lines wait and are written later."""
        if self.ledger is None:
            return
        written = self.ledger.append(event, step=state.step, tokens=state.tokens, **fields)
        if not written and self._ledger_writes:
            self.console.say(f"step {state.step}: the ledger cannot be written (is the disk full?); its lines wait")
        self._ledger_writes = written

    def judge(self, metrics: Metrics, state: State) -> tuple[State, ExitStatus]:
        """Read the waiting steps from the device, and judge and record each. Every rank reads the same numbers."""
        records = metrics.flush()
        if not records:
            return state, ExitStatus.DONE
        speed = metrics.speed(state, sum(r.seconds["save"] + r.seconds["eval"] for r in records))
        memory, refused, status = memory_bytes(self.mesh.device), state.refused_in_a_row, ExitStatus.DONE
        for record in records:
            at, fields = record.state, record._asdict()
            del fields["state"]
            self.event("step", at, **fields, **speed, memory_bytes=memory)
            most = self.config.guard.max_refused_steps
            verdict = judge(record.loss, record.grad_norm, refused_in_a_row=refused, max_refused=most)
            refused = verdict.refused_in_a_row
            if verdict.action == "accept":
                self.accepted = replace(at, refused_in_a_row=0)
            else:
                self.refused_steps += 1
                self.event(verdict.action, at, reason=verdict.reason, loss=record.loss, grad_norm=record.grad_norm)
                self.console.say(f"step {record.step}: {verdict.reason}; the step was refused, no weight changed")
            if verdict.action == "stop":
                status, self.refusal = ExitStatus.NEEDS_PERSON, verdict.reason
        last = self.last = records[-1]
        self.tokens_per_second = speed["tokens_per_second"]
        self._check_reports()
        self.console.step(last, speed["tokens_per_second"] or 0.0, speed["mfu"], metrics.seconds_left())
        self._track(last.step, {**interval_numbers(records), **speed, "memory_bytes": memory})
        return replace(state, refused_in_a_row=refused), status

    def samples(self, state: State, ids: Tensor) -> None:
        """Record the sample ids of this rank in the step that ended at `state`, without padding."""
        if self._samples is not None:
            here = [i for i in ids.tolist() if i != PADDING]
            with self._optional("samples"):
                self._samples.write(json.dumps({"step": state.step, "samples": here}).encode() + b"\n")

    def detail(self, state: State, fields: Mapping[str, object]) -> None:
        """Record the per-layer numbers of a step."""
        self.event("detail", state, **fields)
        flat = {f"{kind}/{layer}": v for kind, by in fields.items() if isinstance(by, dict) for layer, v in by.items()}
        self._track(state.step, flat)

    def save(self, state: State, tensors: Mapping[str, Piece], watch: Stopwatch) -> None:
        """Start a save, after the one before it; no tensor may change before `wait_for_copy`. Collective.

        A state with refused steps at its end is not saved: the save waits until a step is accepted. A failure is an
        event, and does not end the run.
        """
        if self.saved(state, watch):
            return
        self._stays |= permanent(self.config.checkpoint, state.step, self.last_saved.tokens, state.tokens)
        self.save_waits = state.refused_in_a_row > 0
        if self.save_waits:
            return
        stays, self._stays = self._stays, False
        with watch.time("save"):
            contents = manifest_state(self.config, state, self.mesh, self.run_id, self.store.hash, self.lineage)
            self._saver.save(SaveRequest(state.step, contents, stays), {**tensors, **random_state()}, self._beat(state))
            self._saving_ended(self._saver.poll())

    @property
    def scores_are_finite(self) -> bool:
        """Whether the last evaluation gave a number. The same on every rank."""
        return self.scores is None or math.isfinite(self.scores.scores[BITS_PER_BYTE])

    def way_back(self) -> str:
        """`go_back_from` the last accepted step; rank 0 does it."""
        return go_back_from(self.folder, self.accepted.step) if self.mesh.is_first else ""

    def prune(self) -> None:
        """Delete what a finished run does not keep. Only rank 0 deletes."""
        if self.mesh.is_first:
            self._saver.prune()

    def wait_for_copy(self, watch: Stopwatch) -> None:
        """Return when the save under way, if any, has its own copy of every tensor: an update may change them."""
        with watch.time("save"):
            self._saver.wait_for_copy(self._beat(self.last_saved))
            self._saving_ended(self._saver.poll())

    def saved(self, state: State, watch: Stopwatch) -> bool:
        """Wait for the save under way; return whether `state` is in a checkpoint. Collective."""
        with watch.time("save"):
            self._saving_ended(self._saver.wait(self._beat(state)))
        return self.last_saved.step == state.step

    def _saving_ended(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        state = State.from_json(outcome.request.state)
        if outcome.error:
            self._failed(state, "checkpoint", outcome.error)
            return
        self.last_saved = state
        numbers = {name: getattr(outcome, name) for name in ("bytes", "stall_seconds", "total_seconds")}
        self.event("save", state, path=str(outcome.path), **numbers, permanent=outcome.request.permanent)

    def _beat(self, state: State) -> Callable[[], None]:
        return lambda: self.supervisor.heartbeat(state.step)

    def evaluate(self, state: State, scorer: Scorer, watch: Stopwatch) -> None:
        """Evaluate bits per byte on the validation split, and generate samples. Collective."""
        if self._evaluation_tried_at == state.step:
            return
        self._evaluation_tried_at = state.step
        with watch.time("eval"):
            split, problem = self.held_out()
            if self.mesh.sum_on_host([split is None])[0] or split is None:
                self._failed(state, "evaluation", problem or "a rank cannot read the validation split", "made")
                return
            eod, tokenizer = self.store.eod, self.store.tokenizer.backend
            self.scores = bits_per_byte(scorer, split, self.config, self.mesh, eod, self._beat(state))
            written = continue_prompts(scorer, tokenizer, self.config, state.step, self.mesh, eod)
        self.evaluated_at = state.step
        if not self.mesh.is_first:
            return
        try:
            write_result(self.folder.evals, state.step, state.tokens, self.scores, written)
        except OSError as error:
            self._failed(state, "evaluation", str(error))
        numbers = {key: getattr(self.scores, key) for key in ("scores", "stderr", "unaccounted")}
        self.event("eval", state, suite=SUITE, **numbers)
        score, but = self.scores.scores[BITS_PER_BYTE], caveat(self.scores.unaccounted)
        self.console.say(f"step {state.step}: {score:.4f} bits per byte, held out" + (f" ({but})" if but else ""))
        for prompt, text in written:
            self.console.say(f"  {prompt!r} -> {text!r}")
        self._track(state.step, {f"eval/{name}": value for name, value in self.scores.scores.items()})

    def held_out(self) -> tuple[Split | None, str]:
        """The validation split, or None and why it cannot be read: a file may be damaged while the run trains."""
        try:
            if self.mesh.is_first:
                self.check_held_out()
            split = self.store.split("validation")
            split.read_sidecar()
        except UserError as error:
            return None, str(error)
        return split, ""

    def check_held_out(self) -> None:
        """Hash the validation split, unless its files are those that were hashed before. Raises UserError."""
        seen = []
        for file in (self.store.folder / f"validation.{ending}" for ending in ("bin", "idx", "parquet")):
            with reading(file):
                now = file.stat()
            seen.append((now.st_mtime_ns, now.st_size, now.st_ino))
        if seen != self._checked:
            checked_split(self.store, "validation", self._beat(self.last_saved))
            self._checked = seen

    def _failed(self, state: State, what: str, error: str, done: str = "written") -> None:
        self.event("save_failed", state, reason=f"{what}: {error}")
        self.console.say(f"step {state.step}: the {what} could not be {done}: {error}")

    def close(self) -> None:
        """Finish the save under way, also after an error: it has its copy, and other savers still run. Close all."""
        self.console.end()
        self._saving_ended(self._saver.close(self.config.guard.hang_seconds))
        for tracker in self.trackers:
            tracker.close()
        self._check_reports()
        if self.ledger is not None:
            self.ledger.close()
        if self._samples is not None:
            with suppress(OSError):
                self._samples.close()

    def _track(self, step: int, numbers: Mapping[str, float | None]) -> None:
        for tracker in self.trackers:
            tracker.log({name: value for name, value in numbers.items() if value is not None}, step)

    def _check_reports(self) -> None:
        for name, failure in (("output", lost_output()), *((one.name, one.failure) for one in self.trackers)):
            if failure:
                self._report_failed(name, failure)

    @contextmanager
    def _optional(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._report_failed(name, error.strerror or str(error))

    def _report_failed(self, name: str, failure: str) -> None:
        """Record once that some of this report of the run is missing, which does not end the run."""
        if name not in self._failed_reports:
            self._failed_reports.add(name)
            at = State(step=self.last.step, tokens=self.last.tokens) if self.last else State()
            self.event("report_failed", at, reason=f"{name}: {failure}")
            print(f"minka: {name} is incomplete from step {at.step} on: {failure}", file=sys.stderr)
