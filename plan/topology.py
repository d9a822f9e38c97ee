"""Which GPU has which position on the mesh and which layers, and that tensor groups stay inside NVLink domains."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from minka.plan.cli import table_lines
from minka.plan.errors import UserError
from minka.plan.layout import AXES, Layout, counted, divisors

EACH_RANK = 32  # up to so many ranks a table has a line for each rank; above, one for each host
RUNS = 6  # runs of consecutive numbers that are written out


class Place(NamedTuple):
    """Where the launcher put one rank."""

    host: str
    gpu: int  # its index on the host
    rank: int  # the launcher's number


@dataclass(frozen=True)
class Topology:
    """The places of all ranks, in any order, and the size of NVLink domains.

    A domain is part of a host, a host, or several whole hosts; hosts fill such domains in their natural order, each
    with `host_gpus`. Raises ValueError unless the ranks are 0 to n - 1.
    """

    places: tuple[Place, ...]
    domain: int = 0  # GPUs of one NVLink domain: 1 without NVLink, 0 where it is not known and on CPUs
    host_gpus: int = 0  # GPUs of a host, with or without ranks; 0: as many as the ranks show

    def __post_init__(self) -> None:
        if sorted(place.rank for place in self.places) != list(range(len(self.places))):
            raise ValueError(f"the ranks of {len(self.places)} places are not 0 to {len(self.places) - 1}")

    def domains(self) -> list[int]:
        """Return the number of the NVLink domain, from 0, of each mesh position; empty where domains are not known."""
        if not self.domain:
            return []
        places = canonical(self.places)
        width = max([1, self.host_gpus, *(place.gpu + 1 for place in places)])
        hosts = {host: number for number, host in enumerate(dict.fromkeys(place.host for place in places))}
        spanned = self.domain // width  # whole hosts of a domain; 0 or 1 if it is within a host
        keys = [
            (hosts[place.host] // spanned, 0) if spanned > 1 else (hosts[place.host], place.gpu // self.domain)
            for place in places
        ]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return [numbers[key] for key in keys]


def canonical(places: Iterable[Place]) -> list[Place]:
    """Return the places by mesh position: hosts in natural order (node2 before node10), then GPUs."""

    def key(place: Place) -> tuple[list[int | str], str, int, int]:
        parts = enumerate(re.split(r"([0-9]+)", place.host))  # words and numbers alternate, a word first
        return [int(part) if i % 2 else part for i, part in parts], place.host, place.gpu, place.rank

    return sorted(places, key=key)


def check(layout: Layout, topology: Topology) -> None:
    """Raise UserError where the layout does not fit these places.

    Where NVLink domains are known, every rank needs its own GPU, and a tensor group must stay inside one domain.
    """
    layout = layout.resolve(len(topology.places))
    if not topology.domain:
        return
    for one, other in pairwise(canonical(topology.places)):
        if (one.host, one.gpu) == (other.host, other.gpu):
            what = f"ranks {one.rank} and {other.rank} are both on GPU {one.gpu}"
            remedy = "start at most one rank a GPU (srun --ntasks-per-node, torchrun --nproc-per-node)"
            raise UserError(what, where=one.host, why="every rank needs its own GPU", remedy=remedy)
    if not layout.tensor_across_domains:
        _tensor_stays_inside(layout, topology)


def tensor_choices(layout: Layout, topology: Topology) -> list[int]:
    """Return the values of `layout.tensor` whose groups stay inside a domain, with shard = 0."""
    world, ways_of_others = len(topology.places), layout.pipeline * layout.replicate * layout.context
    counts = Counter(topology.domains()).values() or (world,)
    return [ways for ways in divisors(*counts) if world % (ways_of_others * ways) == 0]


def coordinates(layout: Layout, at: int) -> dict[str, int]:
    """Return the coordinate of mesh position `at` on each of AXES. Raises ValueError if it is not on the mesh."""
    if not 0 <= at < layout.world:
        raise ValueError(f"position {at} is not on a mesh of {layout.world}")
    found = {}
    for axis in reversed(AXES):
        at, found[axis] = divmod(at, getattr(layout, axis))
    return {axis: found[axis] for axis in AXES}


def describe(layout: Layout, topology: Topology, layers_by_stage: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return what runs where, for JSON: `axes`, `places` by mesh position, and `stages` with their positions.

    Raises UserError where the layout does not fit the number of places, ValueError unless each stage has layers.
    """
    layout = layout.resolve(len(topology.places))
    if len(layers_by_stage) != layout.stage_count or not all(layers_by_stage):
        raise ValueError(f"layers for {sum(map(bool, layers_by_stage))} of {layout.stage_count} stages")
    domains: Sequence[int | None] = topology.domains() or [None] * layout.world
    places = []
    for at, (place, domain) in enumerate(zip(canonical(topology.places), domains, strict=True)):
        at_axes = coordinates(layout, at)
        held = layout.stages_of_rank(at_axes["pipeline"])
        row = {"position": at, **place._asdict(), "domain": domain, "coordinate": at_axes, "stages": held}
        places.append(row | {"layers": [layer for stage in held for layer in layers_by_stage[stage]]})
    stages = []
    for stage, layers in enumerate(layers_by_stage):
        width, coordinate = layout.world // layout.pipeline, layout.rank_of_stage(stage)  # the slowest axis
        positions = [coordinate * width, (coordinate + 1) * width - 1]
        stages.append({"stage": stage, "layers": list(layers), "positions": positions})
    return {
        "world": layout.world,
        "axes": {axis: getattr(layout, axis) for axis in AXES},
        "schedule": layout.schedule if layout.pipeline > 1 else None,
        "domain_gpus": topology.domain or None,
        "places": places,
        "stages": stages,
    }


def topology_lines(description: Mapping[str, Any]) -> list[str]:
    """Return `describe` as lines for people: ranks (hosts, above EACH_RANK ranks) in mesh order, then stages."""
    places, world = description["places"], description["world"]
    axes = [axis for axis, ways in description["axes"].items() if ways > 1]
    hosts = [list(group) for _, group in groupby(places, key=lambda place: place["host"])]
    gpus = description["domain_gpus"]
    known = ["domain"] if gpus else []
    ranks = [["host", "gpu", "position", "rank", *known, *axes, "stages", "layers"]]
    for group in [[place] for place in places] if world <= EACH_RANK else hosts:
        numbers = [[place[key] for place in group] for key in ("gpu", "position", "rank", *known)]
        numbers += [[place["coordinate"][axis] for place in group] for axis in axes]
        numbers += [[n for place in group for n in place[key]] for key in ("stages", "layers")]
        ranks.append([group[0]["host"], *map(spans, numbers)])
    stages = [["layers", "stage", "positions", "ranks"]]
    for stage in description["stages"]:
        first, last = stage["positions"]
        held_by = [place["rank"] for place in places[first : last + 1]]
        stages.append([spans(stage["layers"]), str(stage["stage"]), spans(range(first, last + 1)), spans(held_by)])
    cut = " x ".join(f"{axis} {description['axes'][axis]}" for axis in axes) or "one rank"
    joined = f"{_gpus(gpus)} in an NVLink domain" if gpus else "NVLink domains not known"
    head = f"{counted(world, 'rank')} on {counted(len(hosts), 'host')}: {cut}; {joined}"
    return [head, *table_lines(ranks), "", *table_lines(stages)]


def spans(numbers: Iterable[int]) -> str:
    """Return numbers in short: "0-3,8", "0-12 by 4", or with more than RUNS runs "0,2-3,9... (40)"."""
    whole = sorted(set(numbers))
    steps = {b - a for a, b in pairwise(whole)}
    if len(whole) > 2 and len(steps) == 1 and steps != {1}:
        return f"{whole[0]}-{whole[-1]} by {steps.pop()}"
    starts = [n for i, n in enumerate(whole) if i == 0 or whole[i - 1] != n - 1]
    ends = [n for i, n in enumerate(whole) if i + 1 == len(whole) or whole[i + 1] != n + 1]
    runs = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return ",".join(runs) if len(runs) <= RUNS else f"{','.join(runs[:RUNS])}... ({len(whole)})"


def _tensor_stays_inside(layout: Layout, topology: Topology) -> None:
    ways, places, domains = layout.tensor, canonical(topology.places), topology.domains()
    short = next((domain for domain, count in Counter(domains).items() if count % ways), None)
    if short is None:
        return
    # Groups are filled in order, so the first that crosses begins in the first domain that groups do not fill.
    first = next(at for at in range(0, len(places), ways) if domains[at] == short and domains[at + ways - 1] != short)
    one, other = places[first], places[first + ways - 1]
    why, more = "a tensor group exchanges activations four times a layer and pass, and other links are slow", ""
    if topology.domain % ways == 0:  # full domains would fit
        mine = [place for place, domain in zip(places, domains, strict=True) if domain == short]
        here = f"{mine[0].host} to {mine[-1].host}" if mine[0].host != mine[-1].host else mine[0].host
        why = f"the domain of {here} has {len(mine)} ranks, which {ways} does not divide; {why}"
        more = f"start a multiple of {ways} ranks in every domain; "
    raise UserError(
        f"tensor={ways} crosses NVLink domains of {_gpus(topology.domain)}: one group would span GPU {one.gpu} "
        f"of {one.host} to GPU {other.gpu} of {other.host}",
        where="layout.tensor",
        why=why,
        remedy=f"{more}works here: tensor in {tensor_choices(layout, topology)} with layout.shard=0; "
        "or layout.tensor_across_domains=true to allow it",
    )


def _gpus(count: int) -> str:
    return f"{count} GPUs" if count > 1 else "one GPU (no NVLink)"
