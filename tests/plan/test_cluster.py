"""Machines that a file describes, rates that a file has, and what is wrong with either."""

from pathlib import Path

import pytest

from minka.plan.cluster import cluster_of, cluster_toml, find_cluster, read_cluster
from minka.plan.errors import UserError
from minka.plan.hardware import GPUS, Gpu
from minka.plan.rates import TABULATED, rates_toml, read_rates

WHOLE = {"name": '"mine"', "peak_tflops": "100", "memory_gb": "24.0", "bandwidth_tb": "1", "link_gb": "32"}


def written(folder: Path, **changes: str | None) -> Path:
    values = {key: value for key, value in {**WHOLE, **changes}.items() if value is not None}
    path = folder / "machine.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in values.items()))
    return path


def test_a_described_machine_is_read(tmp_path: Path) -> None:
    cluster = find_cluster(str(written(tmp_path, network_gb="12.5", host_gpus="4", domain="4")))
    assert (cluster.name, cluster.peak_flops, cluster.memory_bytes) == ("mine", 1e14, 24 * 10**9)
    assert (cluster.network_gb, cluster.domain, cluster.rates) == (12.5, 4, TABULATED)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_machine_survives_its_file(gpu: Gpu, tmp_path: Path) -> None:
    """Units too: they are in the keys."""
    path = tmp_path / "gpu.toml"
    path.write_text(cluster_toml(cluster_of(gpu)))
    if gpu.link_gb:
        assert read_cluster(path) == cluster_of(gpu)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"link_gb": None}, "link_gb missing"),
        ({"peak_tflops": "-1"}, "peak_tflops=-1 is not a number above 0"),
        ({"peak_tflops": "0"}, "is not a number above 0"),
        ({"memory_gb": "nan"}, "is not a number above 0"),
        ({"memory_gb": "80_000_000_000"}, "the unit is in the key's name"),
        ({"memory_gb": '"80"'}, "memory_gb = 80, without quotes"),
        ({"domain": "8.5"}, "domain=8.5 is not an integer above 0"),
        ({"domain": "true"}, "is not an integer above 0"),
        ({"name": "5"}, "name=5 is not a text"),
        ({"bandwith_tb": "1"}, "did you mean 'bandwidth_tb'"),
        ({"rates": "{ matrix = 0 }"}, "matrix=0 is not a number above 0"),
        ({"rates": "{ matrx = 0.5 }"}, "unknown key 'matrx'"),
        ({"rates": "3"}, "[rates] is not a table"),
        ({"name": "]"}, "cannot be read as TOML"),
    ],
    ids=str,
)
def test_a_wrong_file_is_refused_with_what_would_work(
    tmp_path: Path, changes: dict[str, str | None], said: str
) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(UserError) as refusal:
        read_cluster(path)
    assert said in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert refusal.value.remedy


@pytest.mark.parametrize(("name", "near"), [("H100", "H100-SXM"), ("B2000", "B200"), ("v100", "A10"), ("", "H100-SXM")])
def test_an_unknown_gpu_is_refused_with_the_nearest_names(name: str, near: str) -> None:
    with pytest.raises(UserError) as refusal:
        find_cluster(name)
    assert near in refusal.value.remedy
    assert "machine.toml" in refusal.value.remedy


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for read in (read_cluster, read_rates):
        with pytest.raises(UserError) as refusal:
            read(tmp_path / "none.toml")
        assert "none.toml" in str(refusal.value)


def test_rates_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "rates.toml"
    path.write_text(rates_toml(TABULATED))
    assert read_rates(path) == TABULATED
