"""How ranks start: they wait for the first one, find their GPUs and places, and connect."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from minka.parallel import mesh
from minka.parallel.local_device import device_index, topology_of
from minka.parallel.mesh import _await_first, _first_prepares, backends, start_mesh
from minka.parallel.pipeline_engine import PipelineExecutor
from minka.plan.errors import ExitStatus, UserError
from minka.plan.layout import Layout
from minka.plan.topology import Place, Topology, check
from ranks import on_ranks

SILENCE = 20.0  # a busy machine does not keep the first rank quiet for so long


class Clock:
    """For parallel/mesh.py: a sleep takes no time, and all that passes is what is slept."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Counting:
    """The store that a waiting rank looks at, where the first rank counts until it has been looked at 100 times."""

    def __init__(self) -> None:
        self.looks = 0

    def check(self, keys: list[str]) -> bool:
        self.looks += 1
        return self.looks > 100

    def add(self, key: str, amount: int) -> int:
        return self.looks

    def get(self, key: str) -> bytes:
        return b"0"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("minka.parallel.mesh.time", made)
    return made


def ends(prepare: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """How `_first_prepares` ended on each of three ranks, here threads: an exception, or None."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    monkeypatch.setenv("RANK", "1")  # none of them serves a store
    found: dict[int, Any] = {}

    def body(rank: int) -> None:
        try:
            _first_prepares(lambda: prepare(store), store, rank, 3, SILENCE)
            found[rank] = None
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def refuse(error: Exception) -> None:
    raise error


def until_counted(store: Any) -> None:
    while not store.add("preparing", 0):
        pass


def test_the_first_rank_counts_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends(until_counted, monkeypatch) == {0: None, 1: None, 2: None}


def test_the_others_wait_beyond_the_limit_while_the_first_rank_counts(clock: Clock) -> None:
    assert _await_first(Counting(), SILENCE) == 0
    assert clock.now > 5 * SILENCE


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("it is refused"), ExitStatus.REFUSED),
        (UserError("a person must look", status=ExitStatus.NEEDS_PERSON), ExitStatus.NEEDS_PERSON),
        (OSError(5, "Input/output error"), ExitStatus.FAILED),
    ],
)
def test_whatever_ends_the_first_rank_ends_the_others(
    error: Exception, status: ExitStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ends(lambda store: refuse(error), monkeypatch)
    assert found[0] is error
    assert [found[rank].code for rank in (1, 2)] == [status, status]


def test_a_first_rank_that_was_killed_is_noticed(clock: Clock) -> None:
    with pytest.raises(RuntimeError, match="no sign for 20 s"):
        _first_prepares(pytest.fail, dist.HashStore(), 1, 2, SILENCE)  # type: ignore[attr-defined]


def test_nccl_is_bound_to_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded where torch would need a GPU."""
    device, given = torch.device("cuda", 1), dict[str, Any]()

    def note(**options: Any) -> None:
        given.update(options)
        raise InterruptedError

    monkeypatch.setattr(mesh, "local_device", lambda: device)
    monkeypatch.setattr(mesh, "find_topology", lambda *_: Topology((Place("a", 1, 0),)))
    monkeypatch.setattr(dist, "init_process_group", note)
    with pytest.raises(InterruptedError), start_mesh(Layout()):
        pass
    assert (given["backend"], given["device_id"]) == ("cpu:gloo,cuda:nccl", device)
    assert "device_id" not in backends(torch.device("cpu"))


@pytest.mark.parametrize(("local", "visible", "index"), [(0, 1, 0), (7, 1, 0), (3, 8, 3), (0, 8, 0)])
def test_a_rank_has_its_own_gpu_or_the_one_that_it_is_shown(local: int, visible: int, index: int) -> None:
    assert device_index(local, visible) == index


def test_a_rank_for_which_there_is_no_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="LOCAL_RANK is 8, and 8 GPUs are visible"):
        device_index(8, 8)


def reports(visible: int, ids: Sequence[int]) -> list[tuple[str, int, int, str, str]]:
    """Of ranks on one host with H100s, as they are sent to all."""
    return [("a", local, visible, "NVIDIA H100 80GB HBM3", f"GPU-{number}") for local, number in enumerate(ids)]


@pytest.mark.parametrize("visible", [1, 8])
def test_ranks_that_see_their_own_gpu_alone_have_the_places_of_ranks_that_see_all(visible: int) -> None:
    topology = topology_of(reports(visible, range(8)))
    assert [place.gpu for place in topology.places] == list(range(8))
    assert (topology.domain, topology.host_gpus) == (8, 8)
    check(Layout(tensor=8), topology)


def test_ranks_that_are_shown_one_gpu_together_are_refused() -> None:
    with pytest.raises(UserError, match="ranks 1 and 2 are both on GPU 1"):
        check(Layout(), topology_of(reports(1, [0, 1, 1, 2])))


def connections(schedule: str) -> list[tuple[str, int]]:
    """What a rank of a pipeline of three does when its executor is made."""
    done: list[tuple[str, int]] = []

    def noted(name: str, peer: str, real: Callable[..., Any], *given: Any, **more: Any) -> Any:
        done.append((name, more.get(peer, -1)))
        return real(*given, **more)

    layout = Layout.model_validate({"pipeline": 3, "shard": 1, "schedule": schedule})
    with start_mesh(layout) as joined, pytest.MonkeyPatch.context() as patch:
        for name, peer in (("all_reduce", ""), ("send", "group_dst"), ("recv", "group_src")):
            patch.setattr(dist, name, partial(noted, name, peer, getattr(dist, name)))
        PipelineExecutor([], joined)
    return done


@pytest.mark.parametrize(("schedule", "ring"), [("1f1b", False), ("interleaved", True), ("zbv", False)])
def test_a_pipeline_connects_each_pair_of_neighbours_before_its_first_step(schedule: str, ring: bool) -> None:
    first, middle, last = on_ranks(connections, 3, schedule)
    both: Any = ("all_reduce", -1)
    assert first == [both, ("send", 1), *([("send", 2)] if ring else [])]
    assert middle == [both, ("recv", 0), ("send", 2)]
    assert last == [both, *([("recv", 0)] if ring else []), ("recv", 1)]
