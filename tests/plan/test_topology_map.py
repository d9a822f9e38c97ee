"""What runs where is described as JSON and as lines, for any number of ranks."""

import json
import time
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minka.plan.layout import Layout
from minka.plan.topology import (
    EACH_RANK,
    canonical,
    check,
    coordinates,
    describe,
    spans,
    topology_lines,
)
from places import even_layers, filled, shuffled


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_a_description_agrees_with_the_functions_and_is_json(schedule: str) -> None:
    asked = Layout.model_validate({"pipeline": 2, "tensor": 2, "schedule": schedule})
    layout, topology = asked.resolve(16), filled([8, 8], 4, shuffled(16))
    layers = even_layers(layout)
    described = describe(asked, topology, layers)
    assert json.loads(json.dumps(described)) == described
    assert [place["rank"] for place in described["places"]] == [place.rank for place in canonical(topology.places)]
    for at, (place, row) in enumerate(zip(canonical(topology.places), described["places"], strict=True)):
        assert (row["position"], row["host"], row["gpu"], row["rank"]) == (at, *place)
        assert row["domain"] == at // 4
        assert row["coordinate"] == coordinates(layout, at)
        assert row["stages"] == layout.stages_of_rank(row["coordinate"]["pipeline"])
        assert row["layers"] == [layer for stage in row["stages"] for layer in layers[stage]]
    for row in described["stages"]:
        first, last = row["positions"]
        holding = [place["position"] for place in described["places"] if row["stage"] in place["stages"]]
        assert holding == list(range(first, last + 1))
        assert row["layers"] == list(layers[row["stage"]])


def test_a_small_run_has_a_line_for_each_rank_and_a_large_one_for_each_host() -> None:
    layout = Layout(pipeline=2, tensor=2)
    small = topology_lines(describe(layout, filled([8] * 4, 8, shuffled(32)), even_layers(layout)))
    large = topology_lines(describe(layout, filled([8] * 5, 8, shuffled(40)), even_layers(layout)))
    for lines, rows in ((small, EACH_RANK), (large, 5)):
        assert [len(list(part)) for blank, part in groupby(lines, key=lambda line: line == "") if not blank] == [
            2 + rows,
            1 + layout.stage_count,
        ]


def test_a_table_shows_where_everything_is_and_leaves_out_what_is_not_cut() -> None:
    layout = Layout(pipeline=2, tensor=4, schedule="zbv")
    described = describe(layout, filled([8] * 6, 8), even_layers(layout, 3))
    assert topology_lines(described) == [
        "48 ranks on 6 hosts: pipeline 2 x shard 6 x tensor 4; 8 GPUs in an NVLink domain",
        "host   gpu  position  rank   domain  pipeline  shard  tensor  stages  layers",
        "node1  0-7  0-7       0-7    0       0         0-1    0-3     0,3     0-2,9-11",
        "node2  0-7  8-15      8-15   1       0         2-3    0-3     0,3     0-2,9-11",
        "node3  0-7  16-23     16-23  2       0         4-5    0-3     0,3     0-2,9-11",
        "node4  0-7  24-31     24-31  3       1         0-1    0-3     1-2     3-8",
        "node5  0-7  32-39     32-39  4       1         2-3    0-3     1-2     3-8",
        "node6  0-7  40-47     40-47  5       1         4-5    0-3     1-2     3-8",
        "",
        "layers  stage  positions  ranks",
        "0-2     0      0-23       0-23",
        "3-5     1      24-47      24-47",
        "6-8     2      24-47      24-47",
        "9-11    3      0-23       0-23",
    ]


def test_the_ranks_of_a_layer_are_the_launchers_numbers() -> None:
    layout = Layout(pipeline=2)
    cyclic = [host + 4 * gpu for host in range(4) for gpu in range(2)]  # rank 0 on node1, rank 1 on node2, ...
    lines = topology_lines(describe(layout, filled([2] * 4, ranks=cyclic), even_layers(layout)))
    assert lines[0] == "8 ranks on 4 hosts: pipeline 2 x shard 4; NVLink domains not known"
    assert lines[1].split() == "host gpu position rank pipeline shard stages layers".split()
    assert lines[3].split() == "node1 1 1 4 0 1 0 0-1".split()
    assert lines[-2].split() == "0-1 0 0-3 0-1,4-5".split()
    assert topology_lines(describe(Layout(), filled([1]), [range(2)]))[0].startswith("1 rank on 1 host: one rank;")


@given(st.sets(st.integers(0, 40), min_size=1))
def test_spans_have_all_numbers_or_their_count(numbers: set[int]) -> None:
    text = spans(numbers)
    shown, cut, count = text.partition("... (")
    if cut:
        assert count == f"{len(numbers)})"
        assert expanded(shown) < numbers
    else:
        assert expanded(shown) == numbers


def test_spans_name_the_step_of_numbers_that_have_one_and_stop_after_six_runs() -> None:
    assert [spans(numbers) for numbers in ([4], range(3), range(0, 13, 4), [5, 0], [0, 1, 4, 5])] == [
        "4",
        "0-2",
        "0-12 by 4",
        "0,5",
        "0-1,4-5",
    ]
    assert spans([0, 1, 3, 5, 7, 9, 11]) == "0-1,3,5,7,9,11"
    assert spans([0, 1, 3, 5, 7, 9, 11, 13, 14]) == "0-1,3,5,7,9,11... (9)"


def expanded(text: str) -> set[int]:
    """The numbers that a span stands for."""
    found: set[int] = set()
    for part in text.split(","):
        ends, _, step = part.partition(" by ")
        first, _, last = ends.partition("-")
        found |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


def test_sixteen_thousand_ranks_take_about_as_long_for_each_as_a_few_hundred() -> None:
    layout = Layout(pipeline=16, context=2, tensor=8, schedule="interleaved")

    def seconds(hosts: int) -> float:
        topology, began = filled([8] * hosts, 8, shuffled(8 * hosts)), time.process_time()
        check(layout, topology)
        lines = topology_lines(describe(layout, topology, even_layers(layout)))
        assert len(lines) == 4 + hosts + layout.stage_count
        return time.process_time() - began

    few, many = (min(seconds(hosts) for _ in range(3)) for hosts in (32, 2048))
    assert many < 10 * 64 * few  # CPU time; by pairs of ranks it would be 64 * 64 times
