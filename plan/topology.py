"""Where a run's ranks sit: mesh positions given to GPUs whatever the launcher's numbers, what may not cross NVLink, and
which rank holds which layers, as data and as a table for people."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import prod
from typing import Any, NamedTuple

from minka.plan.errors import UserError
from minka.plan.layout import AXES, Layout, divisors

EACH_RANK = 32  # ranks up to which a table has a line for each; beyond, one for each host
RUNS = 6  # of consecutive numbers that are told one by one


class Place(NamedTuple):
    """Where the launcher put one rank."""

    host: str
    gpu: int  # its index on the host
    rank: int  # the launcher's number


@dataclass(frozen=True)
class Topology:
    """The places that a launcher filled, and how many GPUs NVLink joins.

    Places may come in any order; their ranks are 0 to n - 1, or ValueError. A `domain` of GPUs is part of a host, a
    host, or several whole hosts: then hosts are taken to fill domains in their natural order, each with `host_gpus`.
    """

    places: tuple[Place, ...]
    domain: int = 0  # GPUs of one NVLink domain: 1 where there is no NVLink, 0 where that is not known (and on CPUs)
    host_gpus: int = 0  # GPUs of a host, ranks on them or not; 0: as many as ranks show

    def __post_init__(self) -> None:
        if sorted(place.rank for place in self.places) != list(range(len(self.places))):
            raise ValueError(f"the ranks of {len(self.places)} places are not 0 to {len(self.places) - 1}")

    def domains(self) -> list[int]:
        """The number of its NVLink domain for each mesh position, counted from 0; empty where none are known."""
        if not self.domain:
            return []
        places = canonical(self.places)
        width = max([1, self.host_gpus, *(place.gpu + 1 for place in places)])
        hosts = {host: number for number, host in enumerate(dict.fromkeys(place.host for place in places))}
        spanned = self.domain // width  # whole hosts of a domain; 0 or 1 where it lies within one
        keys = [
            (hosts[place.host] // spanned, 0) if spanned > 1 else (hosts[place.host], place.gpu // self.domain)
            for place in places
        ]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return [numbers[key] for key in keys]


def canonical(places: Iterable[Place]) -> list[Place]:
    """The places by mesh position: hosts in natural order (node2 before node10), then GPUs, tensor axis fastest."""
    return sorted(places, key=lambda place: (_natural(place.host), place.host, place.gpu, place.rank))


def order(places: Iterable[Place]) -> tuple[int, ...]:
    """The launcher's rank at each mesh position. Which GPU has which position does not depend on those ranks."""
    return tuple(place.rank for place in canonical(places))


def check(layout: Layout, topology: Topology) -> None:
    """Raises UserError where the layout does not fit these places.

    Their number must be right. Where NVLink domains are known, every rank needs a GPU of its own besides, and a tensor
    group stays inside one domain unless `layout.tensor_across_domains` lets it out.
    """
    layout = layout.resolve(len(topology.places))
    if not topology.domain:
        return
    _each_has_a_gpu(topology)
    if not layout.tensor_across_domains:
        _tensor_stays_inside(layout, topology)


def tensor_choices(layout: Layout, topology: Topology) -> list[int]:
    """Values of `layout.tensor` whose groups stay inside a domain, with the other axes as they are and shard = 0."""
    world, others = len(topology.places), layout.pipeline * layout.replicate * layout.context
    counts = Counter(topology.domains()).values() or (world,)
    return [ways for ways in divisors(*counts) if world % (others * ways) == 0]


def coordinates(layout: Layout, at: int) -> dict[str, int]:
    """The place of mesh position `at` on each of AXES. Raises ValueError where the mesh has no such position."""
    if not 0 <= at < layout.world:
        raise ValueError(f"position {at} is not on a mesh of {layout.world}")
    found = {}
    for axis in reversed(AXES):
        at, found[axis] = divmod(at, getattr(layout, axis))
    return {axis: found[axis] for axis in AXES}


def position(layout: Layout, **coordinate: int) -> int:
    """The mesh position with these coordinates, 0 on axes left out. Raises ValueError where there is none."""
    at = 0
    for axis in AXES:
        ways, index = getattr(layout, axis), coordinate.pop(axis, 0)
        if not 0 <= index < ways:
            raise ValueError(f"{axis}={index} is not on a mesh with {ways} ways of it")
        at = at * ways + index
    if coordinate:
        raise ValueError(f"no axis is called {', '.join(coordinate)}; there are {', '.join(AXES)}")
    return at


def peers(layout: Layout, at: int, axis: str) -> range:
    """Mesh positions of the group of position `at` along an axis, itself among them, in the axis's order."""
    step = prod(getattr(layout, faster) for faster in AXES[AXES.index(axis) + 1 :])
    first = at - coordinates(layout, at)[axis] * step
    return range(first, first + step * getattr(layout, axis), step)


def holders(layout: Layout, layers_by_stage: Sequence[Sequence[int]]) -> dict[int, range]:
    """The mesh positions that hold (a share of) each layer. Raises ValueError unless each stage has layers."""
    if len(layers_by_stage) != layout.stage_count or not all(layers_by_stage):
        raise ValueError(f"layers for {sum(map(bool, layers_by_stage))} stages, and there are {layout.stage_count}")
    return {
        layer: _holding(layout, layout.rank_of_stage(stage))
        for stage, layers in enumerate(layers_by_stage)
        for layer in layers
    }


def describe(layout: Layout, topology: Topology, layers_by_stage: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What runs where, for JSON: `axes`, `places` by mesh position, and `stages` with the positions that hold them.

    Which coordinate of the pipeline axis has which stages is the layout's schedule's to say (in a loop or in a V).
    Raises UserError where the layout does not fit the number of places, ValueError unless each stage has layers.
    """
    layout = layout.resolve(len(topology.places))
    holding = holders(layout, layers_by_stage)
    stages = [layout.stages_of_rank(coordinate) for coordinate in range(layout.pipeline)]
    layers = [[layer for stage in held for layer in layers_by_stage[stage]] for held in stages]
    domains: Sequence[int | None] = topology.domains() or [None] * layout.world
    places = []
    for at, (place, domain) in enumerate(zip(canonical(topology.places), domains, strict=True)):
        coordinate = coordinates(layout, at)
        held = coordinate["pipeline"]
        where = {"position": at, **place._asdict(), "domain": domain, "coordinate": coordinate}
        places.append(where | {"stages": stages[held], "layers": layers[held]})
    return {
        "world": layout.world,
        "axes": {axis: getattr(layout, axis) for axis in AXES},
        "schedule": layout.schedule if layout.pipeline > 1 else None,
        "domain_gpus": topology.domain or None,
        "places": places,
        "stages": [
            {"stage": stage, "layers": list(held), "positions": [holding[held[0]][0], holding[held[0]][-1]]}
            for stage, held in enumerate(layers_by_stage)
        ],
    }


def told(description: Mapping[str, Any]) -> list[str]:
    """`describe` as lines for people: ranks (hosts, beyond EACH_RANK of them) in mesh order, then who holds each stage.

    Axes that are not cut are left out, and so are domains that are not known.
    """
    places, world = description["places"], description["world"]
    axes = [axis for axis, ways in description["axes"].items() if ways > 1]
    hosts = [list(group) for _, group in groupby(places, key=lambda place: place["host"])]
    gpus = description["domain_gpus"]
    cut = " x ".join(f"{axis} {description['axes'][axis]}" for axis in axes) or "one rank"
    joined = f"{_gpus(gpus)} in an NVLink domain" if gpus else "NVLink domains not known"
    groups = [[place] for place in places] if world <= EACH_RANK else hosts
    known = ["domain"] if gpus else []
    rows = [["host", "gpu", "position", "rank", *known, *axes, "stages", "layers"]]
    for group in groups:
        numbers = [[place[key] for place in group] for key in ("gpu", "position", "rank", *known)]
        numbers += [[place["coordinate"][axis] for place in group] for axis in axes]
        numbers += [[n for place in group for n in place[key]] for key in ("stages", "layers")]
        rows.append([group[0]["host"], *map(spans, numbers)])
    held = [["layers", "stage", "positions", "ranks"]]
    for stage in description["stages"]:
        first, last = stage["positions"]
        ranks = [place["rank"] for place in places[first : last + 1]]
        held.append([spans(stage["layers"]), str(stage["stage"]), spans(range(first, last + 1)), spans(ranks)])
    head = f"{world} ranks on {len(hosts)} {'hosts' if len(hosts) > 1 else 'host'}: {cut}; {joined}"
    return [head, *_table(rows), "", *_table(held)]


def spans(numbers: Iterable[int]) -> str:
    """Numbers in a few signs: "0-3,8"; "0-12 by 4"; and where they are all over the place "0,2-3,9... (40)"."""
    whole = sorted(set(numbers))
    steps = {b - a for a, b in pairwise(whole)}
    if len(whole) > 2 and len(steps) == 1 and steps != {1}:
        return f"{whole[0]}-{whole[-1]} by {steps.pop()}"
    starts = [n for i, n in enumerate(whole) if i == 0 or whole[i - 1] != n - 1]
    ends = [n for i, n in enumerate(whole) if i + 1 == len(whole) or whole[i + 1] != n + 1]
    runs = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return ",".join(runs) if len(runs) <= RUNS else f"{','.join(runs[:RUNS])}... ({len(whole)})"


def _natural(name: str) -> list[int | str]:
    """A key that sorts numbers within names by value: words and numbers take turns, a word first."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


def _holding(layout: Layout, coordinate: int) -> range:
    """Mesh positions at a coordinate of the pipeline axis, which is the slowest."""
    size = layout.world // layout.pipeline
    return range(coordinate * size, (coordinate + 1) * size)


def _each_has_a_gpu(topology: Topology) -> None:
    for one, other in pairwise(canonical(topology.places)):
        if (one.host, one.gpu) == (other.host, other.gpu):
            raise UserError(
                f"ranks {one.rank} and {other.rank} are both on GPU {one.gpu}",
                where=one.host,
                why="every rank needs a GPU of its own",
                remedy="start at most one rank a GPU on each host (srun --ntasks-per-node, torchrun --nproc-per-node)",
            )


def _tensor_stays_inside(layout: Layout, topology: Topology) -> None:
    ways, places, domains = layout.tensor, canonical(topology.places), topology.domains()
    counts = Counter(domains)
    short = next((domain for domain, count in counts.items() if count % ways), None)
    if short is None:
        return
    # Groups are filled in order, so the first one that crosses begins in the first domain that they do not fill.
    first = next(at for at in range(0, len(places), ways) if domains[at] == short and domains[at + ways - 1] != short)
    one, other = places[first], places[first + ways - 1]
    why, more = "a tensor group exchanges activations four times a layer and pass, and links beyond NVLink are slow", ""
    if topology.domain % ways == 0:  # it would fit if all domains were full
        mine = [place for place, domain in zip(places, domains, strict=True) if domain == short]
        here = f"{mine[0].host} to {mine[-1].host}" if mine[0].host != mine[-1].host else mine[0].host
        why = f"the domain of {here} has {len(mine)} ranks, which {ways} does not divide; {why}"
        more = f"start a multiple of {ways} ranks in every domain; "
    raise UserError(
        f"tensor={ways} crosses NVLink domains of {_gpus(topology.domain)}: one group would reach from GPU {one.gpu} "
        f"of {one.host} to GPU {other.gpu} of {other.host}",
        where="layout.tensor",
        why=why,
        remedy=f"{more}works here: tensor in {tensor_choices(layout, topology)} with layout.shard=0; "
        "or layout.tensor_across_domains=true to cross all the same",
    )


def _gpus(count: int) -> str:
    return f"{count} GPUs" if count > 1 else "one GPU (there is no NVLink)"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
