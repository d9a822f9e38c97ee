"""The cluster of a plan: a GPU of the table, or one that a TOML file describes, with its links and its host."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from minka.plan.errors import UserError
from minka.plan.hardware import GPUS, NVL72, Gpu, find_gpu
from minka.plan.rates import TABULATED, Rates, rates_of, rates_toml
from minka.plan.read_file import read_toml

TEXTS = ("name", "source")
MOST = {"peak_tflops": 100_000, "memory_gb": 10_000, "bandwidth_tb": 1_000, "link_gb": 100_000, "network_gb": 10_000}


@dataclass(frozen=True)
class Cluster:
    """Rates of one device, and what connects it to the others."""

    name: str
    peak_tflops: float  # of dense products in the compute dtype, 1e12 FLOP/s
    memory_gb: float  # 1e9 bytes
    bandwidth_tb: float  # of its memory, 1e12 bytes/s
    link_gb: float  # to each of its domain, 1e9 bytes/s each way
    network_gb: float = 0.0  # to other domains, 1e9 bytes/s each way; 0 = there are none, or it is not known
    domain: int = 8  # devices that the faster link connects
    host_gpus: int = 8  # devices of a host
    tensor_domain: int = 0  # devices that a tensor group stays within; 0: those of `domain`
    cores: int = 0  # of a host whose ranks share them, each rank using one; 0: a rank has its own device
    together: float = 1.0  # how much slower a rank computes when all cores do
    watts: float = 0.0  # of a device, at most; 0: not known
    source: str = ""
    rates: Rates = TABULATED

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensor_domain", self.tensor_domain or self.domain)

    @property
    def peak_flops(self) -> float:
        """FLOP/s of dense products."""
        return self.peak_tflops * 1e12

    @property
    def device_kind(self) -> str:
        """Torch's word for a rank's device: "cuda" or "cpu"."""
        return "cpu" if self.cores else "cuda"

    @property
    def memory_bytes(self) -> int:
        """Bytes of a device's memory."""
        return round(self.memory_gb * 1e9)

    def crowded(self, world: int) -> float:
        """How much slower a rank computes because others share its cores, or what the cores share."""
        if not self.cores:
            return 1.0
        ranks = min(world, self.host_gpus)
        busy = min(1.0, (ranks - 1) / max(1, self.cores - 1))
        return max(1.0, ranks / self.cores) * (1 + (self.together - 1) * busy)


def find_cluster(name: str, where: str = "--gpu") -> Cluster:
    """Return the cluster of a GPU's name or of a TOML file. Raises UserError, with the nearest names."""
    if name.endswith(".toml"):
        return read_cluster(Path(name))
    gpu = find_gpu(name)
    if gpu is None:
        known = [one.name for one in GPUS]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known
        remedy = f"known: {', '.join(near)}; or describe it in a file: {where} machine.toml"
        raise UserError(f"no GPU {name!r} is known", where=where, remedy=remedy)
    return cluster_of(gpu)


def cluster_of(gpu: Gpu) -> Cluster:
    """Return a GPU of the table in hosts as its maker builds them."""
    # Without NVLink the GPUs of a host still reach each other over PCIe.
    domain = gpu.nvlink_domain if gpu.nvlink_domain == NVL72 else gpu.host_gpus
    rates = (gpu.bf16_tflops, float(gpu.memory_gb), gpu.bandwidth_tb, gpu.link_gb, gpu.network_gb)
    tensor = 1 if gpu.nvlink_domain == 1 else domain  # plan/topology.py refuses wider groups without NVLink
    hosts = (domain, gpu.host_gpus, tensor)
    return Cluster(gpu.name, *rates, *hosts, watts=gpu.watts, source=gpu.source)


def read_cluster(path: Path) -> Cluster:
    """Return the cluster that a file describes. Raises UserError for one that is not whole."""
    remedy = f"write the keys {', '.join(_needed())}; docs/plan.md shows a file"
    return cluster_from(read_toml(path, remedy=remedy), str(path))


def cluster_from(values: Mapping[str, Any], where: str) -> Cluster:
    """Return the cluster of a table of values. Raises UserError."""
    known = [field.name for field in fields(Cluster)]
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"unknown key {key!r}", where=where, remedy=remedy)
        if key != "rates":
            _check(key, value, where)
    missing = [key for key in _needed() if key not in values]
    if missing:
        remedy = f"add {missing[0]} = {'...' if missing[0] in TEXTS else 80}; docs/plan.md has the units"
        raise UserError(f"{', '.join(missing)} missing", where=where, remedy=remedy)
    plain = {key: value for key, value in values.items() if key != "rates"}
    return Cluster(**plain, rates=rates_of(values.get("rates", {}), where))


def _needed() -> list[str]:
    return ["name", "peak_tflops", "memory_gb", "bandwidth_tb", "link_gb"]


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _check(key: str, value: object, where: str) -> None:
    if key in TEXTS:
        if not isinstance(value, str):
            raise UserError(f"{key}={value!r} is not a text", where=where, remedy=f'write {key} = "..."')
        return
    whole = key in ("domain", "host_gpus", "cores", "tensor_domain")
    least = 1 if whole and key != "cores" else 0
    kind = int if whole else int | float
    fine = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and value >= least
    if isinstance(value, str):
        raise UserError(f"{key}={value!r} is a text", where=where, remedy=f"write {key} = {value}, without quotes")
    if fine and key in MOST and float(value) > MOST[key]:  # type: ignore[arg-type]
        what = f"{key}={value!r} is more than any machine has, {MOST[key]:,}"
        raise UserError(what, where=where, remedy="the unit is in the key's name: tflops and tb are 1e12, gb 1e9")
    if not fine or (value == 0 and key not in ("network_gb", "cores", "watts")):
        what = f"{key}={value!r} is not {'an integer' if whole else 'a number'} above 0"
        raise UserError(what, where=where, remedy=f"the unit is in the key's name; write {key} = 8, for example")


def cluster_toml(cluster: Cluster) -> str:
    """Return the file that read_cluster reads."""
    lines = ["# A cluster for `minka plan --gpu FILE`: rates each way, 1e9 bytes/s (gb) and 1e12 (tb)."]
    for field in fields(Cluster):
        value = getattr(cluster, field.name)
        if field.name != "rates":
            lines.append(f'{field.name} = "{value}"' if isinstance(value, str) else f"{field.name} = {_number(value)}")
    return "\n".join(lines) + "\n" + rates_toml(cluster.rates)
