"""Seconds of a collective or a message on a cluster: its place among the links, its bytes, its latency."""

from math import log2
from typing import NamedTuple

from minka.plan.cluster import Cluster
from minka.plan.errors import UserError
from minka.plan.layout import AXES, Layout


class Group(NamedTuple):
    """Ranks at equal distances, as an axis of the mesh has them."""

    ranks: int
    stride: int  # from one to the next

    @classmethod
    def of(cls, layout: Layout, *axes: str) -> "Group":
        """The group of neighbouring axes of the mesh, which a collective runs over together."""
        places = [AXES.index(axis) for axis in axes]
        ranks = stride = 1
        for axis in axes:
            ranks *= getattr(layout, axis)
        for faster in AXES[max(places) + 1 :]:
            stride *= getattr(layout, faster)
        return cls(ranks, stride)


def passes_seconds(cluster: Cluster, group: Group, payload: float, calls: float, *, passes: float = 1.0) -> float:
    """Return the seconds of `calls` collectives that move `payload` bytes together.

    A ring moves (n-1)/n of the payload past every rank in one pass, as an all-gather or a reduce-scatter does; an
    all-reduce has two. Where a group has several members in a domain they share its ways out: each brings its own.
    """
    if group.ranks == 1 or not calls:
        return 0.0
    inside = max(1, min(group.ranks, cluster.domain // group.stride))
    domains = -(-group.ranks // inside)
    seconds = 0.0
    if inside > 1:
        seconds = payload * (group.ranks - 1) / group.ranks / _link(cluster)
    if domains > 1:
        seconds = max(seconds, payload * (1 - 1 / domains) / (inside * _network(cluster)))
    hops = 1 + 2 * log2(domains)  # within a domain starting it is most of its latency; between them there are trips
    return passes * (seconds + calls * cluster.rates.message_seconds * hops)


def message_seconds(cluster: Cluster, group: Group, payload: float) -> float:
    """Return the seconds of a message to the next rank of a group."""
    if group.ranks == 1:
        return 0.0
    bandwidth = _link(cluster) if group.ranks * group.stride <= cluster.domain else _network(cluster)
    return payload / bandwidth + cluster.rates.message_seconds


def _link(cluster: Cluster) -> float:
    if not cluster.link_gb:
        raise _unknown(cluster, "link_gb", "how fast its devices reach each other")
    return cluster.link_gb * 1e9 * cluster.rates.link


def _network(cluster: Cluster) -> float:
    if not cluster.network_gb:
        raise _unknown(cluster, "network_gb", f"how fast more than {cluster.domain} devices reach each other")
    return cluster.network_gb * 1e9 * cluster.rates.network


def _unknown(cluster: Cluster, key: str, what: str) -> UserError:
    remedy = f"describe the cluster in a file with {key}, and give that: --gpu machine.toml (docs/plan.md)"
    return UserError(f"{what} is not known", where=f"--gpu {cluster.name}", remedy=remedy)
