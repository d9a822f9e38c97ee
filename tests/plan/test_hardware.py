"""A GPU is known for certain or not at all."""

import pytest

from minka.plan.hardware import GPUS, Gpu, find_gpu, nvlink_domain


@pytest.mark.parametrize(
    ("driver", "name"),  # what torch.cuda.get_device_name returns
    [
        ("NVIDIA A100-SXM4-40GB", "A100-SXM-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200-SXM"),
        ("NVIDIA H200 NVL", "H200-NVL"),
        ("NVIDIA GH200 480GB", "GH200-96GB"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_drivers_name_finds_the_one_gpu_it_means(driver: str, name: str) -> None:
    gpu = find_gpu(driver)
    assert gpu is not None
    assert gpu.name == name


@pytest.mark.parametrize(
    "name",
    ["", "cpu", "NVIDIA H100", "H1000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla V100-SXM2-16GB", "L40", "xH200"],
)
def test_an_unknown_gpu_is_none(name: str) -> None:
    """A bare "H100" too: the SXM and the PCIe card differ by a third."""
    assert find_gpu(name) is None


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_each_gpu_is_found_by_its_own_name_and_has_a_source(gpu: Gpu) -> None:
    found = find_gpu(gpu.name)
    assert found == gpu
    assert gpu.source


@pytest.mark.parametrize(
    ("driver", "host_gpus", "domain"),
    [
        ("NVIDIA H100 80GB HBM3", 8, 8),
        ("NVIDIA H100 80GB HBM3", 4, 4),
        ("NVIDIA H100 80GB HBM3", 16, 8),
        ("NVIDIA A100-SXM4-80GB", 16, 16),
        ("NVIDIA B200", 8, 8),
        ("NVIDIA GB200", 4, 72),
        ("NVIDIA L40S", 8, 1),
        ("NVIDIA L4", 1, 1),
        ("NVIDIA H100 PCIe", 8, 0),
        ("NVIDIA H100 NVL", 8, 0),
        ("NVIDIA H100", 8, 0),
        ("cpu", 2, 0),
    ],
)
def test_nvlink_joins_a_rack_or_the_gpus_of_a_host_or_none_or_nobody_knows(
    driver: str, host_gpus: int, domain: int
) -> None:
    assert nvlink_domain(driver, host_gpus) == domain
