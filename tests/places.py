"""Described hosts for the tests of plan/topology.py."""

import random

from minka.plan.layout import Layout
from minka.plan.topology import Place, Topology


def filled(counts: list[int], domain: int = 0, ranks: list[int] | None = None, host_gpus: int = 0) -> Topology:
    """Hosts node1, node2, ... with so many ranks each; the launcher counts along them unless `ranks` says otherwise.

    The places are listed in the order of the launcher's ranks.
    """
    at = [(f"node{host}", gpu) for host, count in enumerate(counts, 1) for gpu in range(count)]
    ranks = ranks or list(range(len(at)))
    places = [Place(host, gpu, rank) for (host, gpu), rank in zip(at, ranks, strict=True)]
    return Topology(tuple(sorted(places, key=lambda place: place.rank)), domain, host_gpus)


def shuffled(count: int, seed: int = 0) -> list[int]:
    ranks = list(range(count))
    random.Random(seed).shuffle(ranks)
    return ranks


def even_layers(layout: Layout, each: int = 2) -> list[range]:
    return [range(stage * each, (stage + 1) * each) for stage in range(layout.stage_count)]
