"""GPUs: peak rate and memory, each with its source. A GPU that is not listed has no MFU."""

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """One kind of GPU, with the figures of its data sheet."""

    name: str
    pattern: str  # matches the whole device name: lower case, without the maker, single blanks
    bf16_tflops: float  # dense bf16 tensor-core peak, 1e12 FLOP/s; data sheets print twice this "with sparsity"
    memory_gb: int  # on the data sheet; the driver shows a few percent less
    bandwidth_tb: float  # memory bandwidth, 1e12 bytes/s
    source: str
    # Most GPUs that NVLink connects: 1 = no NVLink, NVL72 = a rack, else a board of one host; 0 = varies (bridges).
    nvlink_domain: int = 0
    link_gb: float = 0.0  # to the GPUs of its domain or host, 1e9 bytes/s each way; 0 = not known
    network_gb: float = 0.0  # of its share of the host's network, 1e9 bytes/s each way
    host_gpus: int = 8  # in the maker's own host, whose network that is
    watts: int = 0  # of a board, at most; 0 = not known

    @property
    def peak_flops(self) -> float:
        """Dense bf16 peak in FLOP/s: what MFU divides by."""
        return self.bf16_tflops * 1e12


A100 = "NVIDIA A100 data sheet (2021)"
H100 = "NVIDIA H100 data sheet (2024)"
H200 = "NVIDIA H200 data sheet (2024)"
NVL72 = 72  # over 18 hosts of four
# Data sheets print links with both ways together: NVLink 3 600, 4 900, 5 1,800; PCIe 4 x16 64, 5 128.
NVLINK3, NVLINK4, NVLINK5, PCIE4, PCIE5 = 300.0, 450.0, 900.0, 32.0, 64.0
# Networks are those of the maker's reference host, a port for each GPU: DGX A100 200 Gb/s, DGX H100, H200 and B200 400,
# DGX B300 and GB300 NVL72 800. A cloud's host may have less: describe it in a file.
IB200, IB400, IB800 = 25.0, 50.0, 100.0
GPUS = (
    Gpu("A100-SXM-40GB", r"a100 sxm4? 40gb", 312.0, 40, 1.555, A100, 16, NVLINK3, IB200, watts=400),
    Gpu("A100-SXM-80GB", r"a100 sxm4? 80gb", 312.0, 80, 2.039, A100, 16, NVLINK3, IB200, watts=400),
    Gpu("A100-PCIe-40GB", r"a100 pcie 40gb", 312.0, 40, 1.555, A100, 0, PCIE4, watts=250),
    Gpu("A100-PCIe-80GB", r"a100 (80gb pcie|pcie 80gb)", 312.0, 80, 1.935, A100, 0, PCIE4, watts=300),
    # Half of 1,979 "with sparsity"; llm-foundry's published MFUs divide by exactly this (tests/plan/test_flops.py).
    Gpu("H100-SXM", r"h100 (sxm5?|80gb hbm3|sxm5? 80gb)", 989.5, 80, 3.35, H100, 8, NVLINK4, IB400, watts=700),
    Gpu("H100-PCIe", r"h100 pcie", 756.5, 80, 2.0, "NVIDIA H100 data sheet (2023)", 0, PCIE5, watts=350),
    Gpu("H100-NVL", r"h100 nvl", 835.5, 94, 3.9, H100, 0, PCIE5, watts=400),
    Gpu("H200-SXM", r"h200( sxm5?)?", 989.5, 141, 4.8, H200, 8, NVLINK4, IB400, watts=700),
    Gpu("H200-NVL", r"h200 nvl", 835.5, 141, 4.8, H200, 0, PCIE5, watts=600),
    Gpu("GH200-96GB", r"gh200 (480gb|96gb hbm3)", 989.5, 96, 4.0, "NVIDIA GH200 data sheet (2024)", 0, 0.0, IB400, 1),
    # An HGX board of eight: 36 PFLOP/s sparse, so 2.25 dense each, at 180 GB usable.
    Gpu("B200", r"b200( sxm)?", 2250.0, 180, 7.7, "NVIDIA HGX B200 data sheet (2025)", 8, NVLINK5, IB400, watts=1000),
    # An NVL72 rack: 360 PFLOP/s sparse over 72, so 2.5 dense each.
    Gpu(
        "GB200",
        r"gb200",
        2500.0,
        186,
        8.0,
        "NVIDIA GB200 NVL72 data sheet (2025)",
        NVL72,
        NVLINK5,
        IB400,
        4,
        watts=1200,
    ),
    # HGX B300: 36 PFLOP/s sparse over eight, 2.1 TB of memory; a DGX B300 has eight 800 Gb/s ports.
    Gpu("B300", r"b300( sxm6?)?", 2250.0, 262, 8.0, "NVIDIA HGX B300 data sheet (2025)", 8, NVLINK5, IB800),
    # An NVL72 rack: 360 PFLOP/s sparse and 20 TB over 72.
    Gpu("GB300", r"gb300", 2500.0, 277, 8.0, "NVIDIA GB300 NVL72 data sheet (2025)", NVL72, NVLINK5, IB800, 4),
    Gpu("L40S", r"l40s", 362.05, 48, 0.864, "NVIDIA L40S data sheet (2023)", 1, PCIE4, watts=350),
    Gpu("L4", r"l4", 121.0, 24, 0.3, "NVIDIA L4 data sheet (2023)", 1, PCIE4, watts=72),
    Gpu("A40", r"a40", 149.7, 48, 0.696, "NVIDIA A40 data sheet (2021)", 0, PCIE4, watts=300),
    Gpu("A10", r"a10", 125.0, 24, 0.6, "NVIDIA A10 data sheet (2021)", 1, PCIE4, watts=150),
    Gpu("RTX-A6000", r"rtx a6000", 154.8, 48, 0.768, "NVIDIA RTX A6000 data sheet (2021)", 0, PCIE4, watts=300),
    # GeForce: the rate with fp32 accumulation, which is half of that with fp16 accumulation.
    Gpu(
        "RTX-4090",
        r"geforce rtx 4090|rtx 4090",
        165.2,
        24,
        1.008,
        "NVIDIA Ada white paper v2.02, app. A",
        1,
        PCIE4,
        watts=450,
    ),
    Gpu(
        "RTX-3090",
        r"geforce rtx 3090|rtx 3090",
        71.0,
        24,
        0.936,
        "NVIDIA GA102 white paper v2, table 9",
        0,
        PCIE4,
        watts=350,
    ),
    # Seven links of 64 GB/s each way, one to each other GPU of the board.
    Gpu(
        "MI300X",
        r"instinct mi300x",
        1307.4,
        192,
        5.3,
        "AMD Instinct MI300X data sheet (2023)",
        8,
        448.0,
        IB400,
        watts=750,
    ),
)


def find_gpu(name: str) -> Gpu | None:
    """Return the GPU that a driver (or a person) calls `name`, or None unless it is certain.

    A slice of a GPU (MIG) is not certain: its peak is not that of the whole GPU.
    """
    words = re.sub(r"[\s_-]+", " ", name.strip().lower())
    words = re.sub(r"^(nvidia|amd) ", "", words)
    found = (g for g in GPUS if re.fullmatch(g.pattern, words) or words == g.name.lower().replace("-", " "))
    return next(found, None)


def nvlink_domain(name: str, host_gpus: int) -> int:
    """Return the GPUs of one NVLink domain on hosts with `host_gpus` of the GPU `name`; 0 where it is not known.

    Assumes that one board fills a host. A host with two boards (of four, say) has smaller domains than this returns.
    """
    gpu = find_gpu(name)
    if gpu is None:
        return 0
    return gpu.nvlink_domain if gpu.nvlink_domain == NVL72 else min(gpu.nvlink_domain, host_gpus)
