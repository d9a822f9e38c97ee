"""Where ranks sit does not depend on how a launcher counts, and what would cross NVLink is refused unless asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minka.plan.errors import ExitStatus, UserError
from minka.plan.layout import AXES, Layout, divisors
from minka.plan.topology import (
    Place,
    Topology,
    canonical,
    check,
    coordinates,
    describe,
    tensor_choices,
)
from places import filled, shuffled

WAYS = st.integers(1, 4)


def refusal(layout: Layout, topology: Topology) -> UserError:
    with pytest.raises(UserError) as caught:
        check(layout, topology)
    assert caught.value.status is ExitStatus.REFUSED
    assert caught.value.why
    assert caught.value.remedy
    return caught.value


@given(counts=st.lists(st.integers(1, 8), min_size=1, max_size=12), data=st.data())
def test_no_numbering_by_the_launcher_changes_which_gpu_has_which_position(
    counts: list[int], data: st.DataObject
) -> None:
    at = [(host, gpu) for host, count in enumerate(counts, 1) for gpu in range(count)]
    ranks = data.draw(st.permutations(range(len(at))))
    places = data.draw(
        st.permutations([Place(f"node{host}", gpu, rank) for (host, gpu), rank in zip(at, ranks, strict=True)])
    )
    by_rank = {place.rank: (place.host, place.gpu) for place in places}
    assert [by_rank[place.rank] for place in canonical(places)] == [(f"node{host}", gpu) for host, gpu in at]
    assert [place.rank for place in canonical(places)] == ranks


@given(hosts=st.lists(st.text("ab019-", min_size=1, max_size=6), unique=True, min_size=1, max_size=6), data=st.data())
def test_hosts_of_any_names_have_one_order(hosts: list[str], data: st.DataObject) -> None:
    one = canonical(Place(host, 0, rank) for rank, host in enumerate(hosts))
    other = canonical(Place(host, 0, rank) for rank, host in enumerate(data.draw(st.permutations(hosts))))
    assert [place.host for place in one] == [place.host for place in other]


def test_hosts_are_in_natural_order() -> None:
    wanted = ["gpu-a2-node9", "gpu-a10-node1", "gpu-a10-node2", "gpu-a10-node10", "node01", "node1", "node2", "node10"]
    places = [Place(host, 0, rank) for rank, host in enumerate(sorted(wanted))]
    assert [place.host for place in canonical(places)] == wanted


def test_hosts_whose_numbers_are_alike_keep_their_ranks_apart() -> None:
    places = [Place(host, gpu, rank) for rank, (gpu, host) in enumerate((g, h) for g in (0, 1) for h in ("n1", "n01"))]
    assert [place[:2] for place in canonical(places)] == [("n01", 0), ("n01", 1), ("n1", 0), ("n1", 1)]


def test_ranks_that_are_no_numbering_are_no_topology() -> None:
    for ranks in [(0, 0), (0, 2), (1, 2)]:
        with pytest.raises(ValueError, match="0 to 1"):
            Topology(tuple(Place("node1", gpu, rank) for gpu, rank in enumerate(ranks)))


# Hosts, ranks on each, GPUs a domain, tensor; and the values that work, or None where it is allowed.
DESCRIBED = [
    (16, 4, 4, 4, None),
    (16, 4, 4, 8, [1, 2, 4]),
    (8, 8, 8, 8, None),
    (8, 8, 8, 16, [1, 2, 4, 8]),
    (2, 8, 4, 4, None),  # two domains in each host
    (2, 8, 4, 8, [1, 2, 4]),
    (36, 4, 72, 8, None),  # two racks of 18 hosts
    (36, 4, 72, 72, None),
    (36, 4, 72, 16, [1, 2, 3, 4, 6, 8, 9, 12, 18, 24, 36, 72]),
    (8, 4, 72, 16, None),  # less than a rack: nothing to cross
    (3, 8, 1, 2, [1]),  # no NVLink
]


@pytest.mark.parametrize(("hosts", "each", "domain", "tensor", "works"), DESCRIBED)
def test_a_tensor_group_across_nvlink_domains_is_refused_with_what_works(
    hosts: int, each: int, domain: int, tensor: int, works: list[int] | None
) -> None:
    topology = filled([each] * hosts, domain, shuffled(hosts * each))
    if works is None:
        check(Layout(tensor=tensor), topology)
        return
    error = refusal(Layout(tensor=tensor), topology)
    assert error.where == "layout.tensor"
    assert f"{works} with layout.shard=0" in error.remedy
    assert "layout.tensor_across_domains=true" in error.remedy
    assert "the domain of" not in error.why  # hosts are even: none of them is to blame
    assert (f"domains of {domain} GPUs" if domain > 1 else "no NVLink") in error.what
    for ways in works:
        check(Layout(tensor=ways), topology)
    check(Layout(tensor=tensor, tensor_across_domains=True), topology)


def test_the_refusal_names_the_first_group_that_crosses() -> None:
    assert "GPU 0 of node17 to GPU 3 of node20" in refusal(Layout(tensor=16), filled([4] * 36, 72)).what


@given(counts=st.lists(st.integers(1, 8), min_size=1, max_size=5), domain=st.sampled_from([1, 2, 4, 8]))
def test_the_values_that_are_offered_are_those_whose_groups_stay_inside(counts: list[int], domain: int) -> None:
    topology = filled(counts, domain, host_gpus=8)
    at = [(place.host, place.gpu // domain) for place in topology.places]
    offered = tensor_choices(Layout(), topology)
    for ways in divisors(len(at)):
        inside = all(len(set(at[first : first + ways])) == 1 for first in range(0, len(at), ways))
        assert (ways in offered) == inside
        if inside:
            check(Layout(tensor=ways), topology)
        else:
            refusal(Layout(tensor=ways), topology)


def test_what_is_offered_leaves_the_other_axes_as_they_are() -> None:
    topology = filled([8] * 2, 8)
    error = refusal(Layout(replicate=2, context=4, tensor=2, shard=1), filled([1] * 16, 1))
    assert "[1]" in error.remedy
    assert tensor_choices(Layout(replicate=2, context=4), topology) == [1, 2]
    assert tensor_choices(Layout(pipeline=4), topology) == [1, 2, 4]


@pytest.mark.parametrize(
    ("counts", "domain", "tensor", "short", "group"),
    [
        ([8, 6, 8, 2], 8, 4, "node2 has 6", "GPU 4 of node2 to GPU 1 of node3"),
        ([8, 8, 7, 1], 8, 8, "node3 has 7", "GPU 0 of node3 to GPU 0 of node4"),
        ([3, 8, 5], 8, 2, "node1 has 3", "GPU 2 of node1 to GPU 0 of node2"),
        ([4, 4, 4, 2, 4, 2], 8, 4, "node3 to node4 has 6", "GPU 0 of node4 to GPU 1 of node5"),  # domains of two hosts
    ],
)
def test_a_host_with_fewer_ranks_than_tensor_groups_need_is_named(
    counts: list[int], domain: int, tensor: int, short: str, group: str
) -> None:
    error = refusal(Layout(tensor=tensor), filled(counts, domain))
    assert f"the domain of {short} ranks" in error.why
    assert f"{group}" in error.what
    assert f"start a multiple of {tensor} ranks in every domain" in error.remedy


def test_a_host_with_fewer_ranks_that_fill_tensor_groups_is_allowed() -> None:
    check(Layout(tensor=2), filled([8, 6, 2], 8))
    check(Layout(tensor=4), filled([8, 4], 8))


def test_ranks_in_the_middle_of_a_host_are_in_the_domains_of_their_gpus() -> None:
    places = tuple(Place("node1", gpu, rank) for rank, gpu in enumerate((2, 3, 4, 5)))
    topology = Topology(places, domain=4, host_gpus=8)
    assert topology.domains() == [0, 0, 1, 1]
    check(Layout(tensor=2), topology)
    refusal(Layout(tensor=4), topology)


def test_a_rack_takes_as_many_hosts_as_their_gpus_fill_not_their_ranks() -> None:
    half_used = filled([2] * 36, 72, host_gpus=4)
    assert half_used.domains() == [0] * 36 + [1] * 36
    assert filled([2] * 36, 72).domains() == [0] * 72  # nobody said that the hosts have four


def test_two_ranks_on_one_gpu_are_refused_by_name() -> None:
    places = (Place("node1", 0, 0), Place("node2", 3, 2), Place("node1", 1, 1), Place("node2", 3, 3))
    error = refusal(Layout(), Topology(places, domain=8))
    assert error.where == "node2"
    assert error.what == "ranks 2 and 3 are both on GPU 3"
    refusal(Layout(tensor=2, tensor_across_domains=True), Topology(places, domain=8))


def test_where_domains_are_not_known_nothing_is_refused_but_a_wrong_number_of_ranks() -> None:
    check(Layout(tensor=8), filled([3, 4, 1]))
    check(Layout(tensor=2), Topology((Place("laptop", 0, 0), Place("laptop", 0, 1))))
    assert filled([4]).domains() == []
    assert "not 8" in refusal(Layout(tensor=3), filled([8])).what


@given(pipeline=WAYS, replicate=WAYS, shard=WAYS, context=WAYS, tensor=WAYS)
def test_every_position_has_its_own_coordinate_and_tensor_is_fastest(**ways: int) -> None:
    layout = Layout.model_validate(ways)
    found = [coordinates(layout, at) for at in range(layout.world)]
    assert [tuple(coordinate) for coordinate in found] == [AXES] * layout.world
    assert [tuple(coordinate.values()) for coordinate in found] == sorted({tuple(c.values()) for c in found})
    assert all(0 <= coordinate[axis] < ways[axis] for coordinate in found for axis in AXES)


@pytest.mark.parametrize("at", [-1, 4])
def test_a_position_that_is_not_on_the_mesh_is_an_error(at: int) -> None:
    with pytest.raises(ValueError, match="not on a mesh of 4"):
        coordinates(Layout(shard=2, tensor=2), at)


def held(layout: Layout, layers: list[list[int]]) -> dict[int, list[int]]:
    """The first and the last position that hold each layer."""
    stages = describe(layout, filled([layout.world]), layers)["stages"]
    return {layer: stage["positions"] for stage in stages for layer in stage["layers"]}


def test_layers_are_held_in_a_loop_or_in_a_v() -> None:
    loop = Layout(pipeline=2, shard=2, tensor=2, schedule="interleaved", stages_per_rank=2)
    v = loop.model_copy(update={"schedule": "zbv", "stages_per_rank": 0})
    layers = [[0], [1], [2], [3, 4]]
    first, second = [0, 3], [4, 7]
    assert held(loop, layers) == {0: first, 1: second, 2: first, 3: second, 4: second}
    assert held(v, layers) == {0: first, 1: second, 2: second, 3: first, 4: first}
    assert held(Layout(shard=3), [[0, 1]]) == {0: [0, 2], 1: [0, 2]}
    for wrong in ([[0], [1], [2]], [[0], [1], [2], []]):
        with pytest.raises(ValueError, match="of 4 stages"):
            held(loop, wrong)
