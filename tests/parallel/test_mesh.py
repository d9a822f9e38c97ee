"""The first rank prepares a run while the others wait: as long as it works, and no longer."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from minka.parallel.mesh import _first_prepares
from minka.plan.errors import ExitStatus, UserError

SILENCE = 1.0


def ends(prepare: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """How `_first_prepares` ended on each of three ranks, here threads: an exception, or None."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    monkeypatch.setenv("RANK", "1")  # none of them serves a store
    found: dict[int, Any] = {}

    def body(rank: int) -> None:
        try:
            _first_prepares(prepare, store, rank, 3, SILENCE)
            found[rank] = None
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return found


def refuse(error: Exception) -> None:
    raise error


def test_the_others_wait_beyond_the_limit_while_the_first_rank_works(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends(lambda: time.sleep(3 * SILENCE), monkeypatch) == {0: None, 1: None, 2: None}


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
    found = ends(lambda: refuse(error), monkeypatch)
    assert found[0] is error
    assert [found[rank].code for rank in (1, 2)] == [status, status]


def test_a_first_rank_that_was_killed_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="no sign for 1 s"):
        _first_prepares(pytest.fail, dist.HashStore(), 1, 2, SILENCE)  # type: ignore[attr-defined]
