"""Several ranks in one process without a process group: threads that take turns in a random order."""

import threading
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch

from minka.parallel.mesh import Mesh
from minka.plan.layout import Layout


class TurnMesh(Mesh):
    """A rank's mesh; its sums are made by `Turns`."""

    turns: "Turns"

    def sum_on_host(self, numbers: Sequence[int]) -> list[int]:
        return self.turns.sum(self.rank, [int(number) for number in numbers])

    def with_own_host_group(self) -> "TurnMesh":
        return self


class Turns:
    """One rank runs at a time, up to its next sum. The sum is made when every rank has reached it."""

    def __init__(self, ranks: int, dice: Random) -> None:
        self.ranks, self.dice = ranks, dice
        self._waiting = [threading.Event() for _ in range(ranks)]
        self._order: list[int] = []
        self._given: dict[int, list[int]] = {}
        self._sum: list[int] = []
        self._broken: BaseException | None = None

    def run(self, body: Callable[[Mesh], Any]) -> list[Any]:
        """Return `body(mesh)` of each rank. An exception on one rank ends the others and is raised here."""
        results: list[Any] = [None] * self.ranks

        def rank(number: int) -> None:
            mesh = TurnMesh(Layout(shard=self.ranks), torch.device("cpu"), number, None)
            object.__setattr__(mesh, "turns", self)
            self._wait(number)
            try:
                if self._broken is None:
                    results[number] = body(mesh)
            except BaseException as error:
                self._broken = self._broken or error
            self._next()

        threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(self.ranks)]
        for thread in threads:
            thread.start()
        self._shuffle()
        self._next()
        for thread in threads:
            thread.join()
        if self._broken is not None:
            raise self._broken
        return results

    def sum(self, rank: int, numbers: list[int]) -> list[int]:
        self._given[rank] = numbers
        if len(self._given) == self.ranks:
            self._sum = [sum(column) for column in zip(*self._given.values(), strict=True)]
            self._given = {}
            self._shuffle()
        self._next()
        self._wait(rank)
        if self._broken is not None:
            raise self._broken
        return self._sum

    def _shuffle(self) -> None:
        self._order = self.dice.sample(range(self.ranks), self.ranks)

    def _next(self) -> None:
        if self._order:
            self._waiting[self._order.pop()].set()
        elif self._broken is not None:
            for event in self._waiting:
                event.set()

    def _wait(self, rank: int) -> None:
        self._waiting[rank].wait()
        self._waiting[rank].clear()
