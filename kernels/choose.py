"""Which implementation of each operation runs: one value, decided once, and handed to whoever computes.

"torch" is the definition with a backward of its own, "aten" torch's own kernel, "triton" ours. `auto` takes what was
measured fastest on this kind of GPU (choices.toml), and the definition where nothing was measured.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.attention import SDPBackend

from minka.kernels import rms_norm
from minka.kernels.flash_attention_forward import WIDEST as WIDEST_HEAD
from minka.kernels.flash_attn_package import installed_version
from minka.kernels.optional_triton import interprets, triton
from minka.kernels.torch_attention import gpu_backends

Way = Literal["torch", "aten", "triton"]
Own = Literal["torch", "triton"]
Provider = Literal["sdpa", "varlen", "flex", "triton", "flash-attn"]
CHOICES = Path(__file__).parent / "choices.toml"
OLDEST = (8, 0)  # compute capability from which the kernels are compiled and tested
FLEX_NARROWEST = 16  # channels of a head, for Inductor's template
COMPILED_MARGIN = 0.9  # an operator keeps Inductor from fusing across it: it must win clearly


@dataclass(frozen=True)
class Kernels:
    """The implementation of each operation. `reasons`: why, by operation; `fallbacks`: what was asked for in vain."""

    rms_norm: Way = "torch"
    rope: Own = "torch"
    swiglu: Own = "torch"
    cross_entropy: Own = "torch"
    adamw: Own = "torch"
    grad_norm: Own = "torch"
    attention: Provider = "sdpa"
    reasons: Mapping[str, str] = field(default_factory=dict, compare=False)
    fallbacks: tuple[str, ...] = field(default=(), compare=False)

    def ways(self) -> dict[str, str]:
        """{operation: implementation}."""
        return {operation: getattr(self, operation) for operation in (*OPERATIONS, "attention")}


OPERATIONS = ("rms_norm", "rope", "swiglu", "cross_entropy", "adamw", "grad_norm")


class Machine(NamedTuple):
    """Torch's kind of device, the GPU's name and compute capability, and whether Triton is installed."""

    kind: str
    gpu: str = ""
    capability: tuple[int, int] | None = None
    triton: bool = triton is not None

    @classmethod
    def of(cls, device: torch.device) -> "Machine":
        if device.type != "cuda":
            return cls(device.type)
        return cls("cuda", torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


class Work(NamedTuple):
    """What is computed: in which dtype, how wide each operation's rows are, and whether blocks are compiled.

    obstacles: what keeps Triton's kernel from an operation in this run, by operation. only_defined: why torch has no
    kernel of its own for an operation, by operation; Triton's then runs wherever it can.
    """

    dtype: torch.dtype
    widths: Mapping[str, int]
    compiled: bool = False
    obstacles: Mapping[str, str] = MappingProxyType({})
    only_defined: Mapping[str, str] = MappingProxyType({})


def choose(asked: Mapping[str, str], machine: Machine, work: Work) -> Kernels:
    """The kernels for `work` on `machine`; asked: "auto", "triton" or "torch" by operation, and whose attention.

    What cannot run is replaced: by the definition or torch's own kernel, in attention by SDPA. `fallbacks` says so.
    """
    ways, reasons, slow = dict[str, Any](), dict[str, str](), list[str]()
    replaced: dict[str, list[tuple[str, str, str]]] = {}  # by reason: operation, what was asked for, what runs
    for operation in OPERATIONS:
        wanted = asked.get(operation, "auto")
        obstacle = cannot_run(operation, machine, work)
        plain = _plain(operation, machine, work)
        if wanted == "auto":
            ways[operation], reasons[operation] = _fastest(operation, plain, obstacle, machine, work)
        elif wanted == "triton" and obstacle:
            ways[operation], reasons[operation] = plain, f"triton cannot run: {obstacle}"
            replaced.setdefault(obstacle, []).append((operation, "triton", plain))
        else:
            ways[operation], reasons[operation] = ("triton" if wanted == "triton" else plain), "asked for"
        if ways[operation] != "triton" and operation in work.only_defined:
            slow.append(f"kernels.{operation}: {work.only_defined[operation]}, and Triton's cannot run or was not "
                        "asked for: its definition does, many times slower")  # fmt: skip
    wanted = asked.get("attention", "auto")
    provider, reasons["attention"] = _provider(wanted, machine, work)
    if provider != wanted != "auto":
        replaced.setdefault(reasons["attention"], []).append(("attention", wanted, provider))
    if provider == "sdpa" and _holds_all_logits(machine, work):
        slow.append("kernels.attention: of torch's kernels only the slowest runs here, which holds all logits")
    fallbacks = [_describe_replaced(reason, rows) for reason, rows in replaced.items()]
    return Kernels(**ways, attention=provider, reasons=reasons, fallbacks=(*fallbacks, *slow))


def _describe_replaced(reason: str, rows: Sequence[tuple[str, str, str]]) -> str:
    """One line for all operations that `reason` keeps from running as asked: of each, what runs in place of what."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for operation, wanted, way in rows:
        pairs.setdefault((way, wanted), []).append(operation)
    parts = [f"{way} runs instead of {wanted} for {', '.join(names)}" for (way, wanted), names in pairs.items()]
    return f"kernels: {reason}; {'; '.join(parts)}"


def _provider(wanted: str, machine: Machine, work: Work) -> tuple[Provider, str]:
    """Whose attention runs, and why. A plain GPU takes torch's kernels for documents of any length."""
    if wanted == "sdpa":
        return "sdpa", "asked for"
    candidates: tuple[Provider, ...] = ("varlen", "flex", "triton", "flash-attn")
    obstacles = {name: cannot_attend(name, machine, work) for name in candidates}
    if wanted != "auto":
        (asked_for,) = (name for name in candidates if name == wanted)
        return (asked_for, "asked for") if not obstacles[asked_for] else ("sdpa", obstacles[asked_for])
    width = work.widths["attention"]
    row = nearest_row(read_choices(), "attention", machine.gpu, width)
    times = {name: row[f"{name}_ms"] for name in candidates if row is not None and f"{name}_ms" in row}
    possible = [name for name in times if not obstacles[name]]
    if possible:
        best = min(possible, key=times.__getitem__)
        return best, ", ".join(f"{name} {times[name]:g} ms" for name in possible) + f", measured on {machine.gpu}"
    if obstacles["varlen"]:
        if _holds_all_logits(machine, work) and not obstacles["triton"]:
            return "triton", f"{obstacles['varlen']}; SDPA would hold all logits"
        return "sdpa", obstacles["varlen"]
    return "varlen", f"nothing measured on {machine.gpu or machine.kind} with torch {torch_version()}"


def _holds_all_logits(machine: Machine, work: Work) -> bool:
    """Whether SDPA has no better backend for masked attention on this GPU."""
    if machine.kind != "cuda" or work.dtype == torch.float64:
        return False  # on a CPU it is as good as any; in fp64 nobody expects speed
    backends = gpu_backends(work.dtype, work.widths["attention"], machine.capability or OLDEST, masked=True)
    return backends == (SDPBackend.MATH,)


def cannot_attend(provider: str, machine: Machine, work: Work) -> str:
    """Why a provider of attention over packed documents cannot run; empty if it can."""
    width = work.widths["attention"]
    if width > WIDEST_HEAD:
        return f"heads of {width} channels, and {provider} takes at most {WIDEST_HEAD}"
    if provider == "triton":
        return cannot_run("attention", machine, work)
    if provider == "flash-attn" and not installed_version():
        return "flash-attn is not installed"
    if machine.kind != "cuda":
        return "there is no GPU"
    if machine.capability is not None and machine.capability < OLDEST:
        return f"{machine.gpu} has compute capability {_dotted(machine.capability)}, and {provider} needs 8.0"
    if provider == "flex" and width < FLEX_NARROWEST:
        return f"heads of {width} channels, and flex takes at least {FLEX_NARROWEST}"
    if provider != "flex" and width % 8:
        return f"heads of {width} channels, and {provider} takes multiples of 8"
    if work.dtype not in (torch.bfloat16, torch.float16) and (provider, work.dtype) != ("flex", torch.float32):
        return f"{provider} computes in half precision, and the run in {str(work.dtype).removeprefix('torch.')}"
    return ""


def cannot_run(operation: str, machine: Machine, work: Work) -> str:
    """Why the Triton kernel of an operation cannot run; empty if it can."""
    if not machine.triton:
        return "triton is not installed"
    if machine.kind != "cuda" and not interprets():
        return "there is no GPU"
    if machine.capability is not None and machine.capability < OLDEST:
        return f"{machine.gpu} has compute capability {_dotted(machine.capability)}, and the kernels need 8.0"
    if work.dtype == torch.float64:
        return "the kernels compute in fp32, not in fp64"
    if operation in work.obstacles:
        return work.obstacles[operation]
    if operation == "rms_norm" and work.widths[operation] > rms_norm.WIDEST:
        return f"rows of {work.widths[operation]:,} elements, and at most {rms_norm.WIDEST:,} fit"
    return ""


def _plain(operation: str, machine: Machine, work: Work) -> Way:
    """torch's own kernel where it has one for GPUs that is better than the definition."""
    own = operation == "rms_norm" and machine.kind == "cuda" and work.dtype != torch.float64
    return "aten" if own else "torch"


def _fastest(operation: str, plain: Way, obstacle: str, machine: Machine, work: Work) -> tuple[Way, str]:
    if obstacle:
        return plain, obstacle
    if operation in work.only_defined:
        return "triton", work.only_defined[operation]
    row = nearest_row(read_choices(), operation, machine.gpu, work.widths.get(operation, 1))
    if row is None:
        return plain, f"nothing measured on {machine.gpu or machine.kind} with torch {torch_version()}"
    known = [name for name in ("triton", "torch", "compile") if f"{name}_ms" in row]
    compiled = work.compiled and "compile" in known
    rival = row["compile_ms"] * COMPILED_MARGIN if compiled else row.get("torch_ms", 0.0)
    way: Way = "triton" if row.get("triton_ms", math.inf) < rival else plain
    times = ", ".join(f"{name} {row[f'{name}_ms']:g} ms" for name in known)
    return way, f"measured on {machine.gpu}: {times} at width {row['width']}"


def nearest_row(rows: Sequence[Mapping[str, Any]], operation: str, gpu: str, width: int) -> Mapping[str, Any] | None:
    """The measurement of the operation on this GPU with this torch whose width is nearest, by ratio."""
    here = [r for r in rows if (r["operation"], r["gpu"], r["torch"]) == (operation, gpu, torch_version())]
    return min(here, key=lambda row: abs(math.log(row["width"] / width)), default=None)


@cache
def read_choices() -> tuple[Mapping[str, Any], ...]:
    """The rows of choices.toml."""
    return tuple(tomllib.loads(CHOICES.read_text(encoding="utf-8")).get("measured", ()))


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def torch_version() -> str:
    """Major and minor version: kernels of torch change with them."""
    return ".".join(torch.__version__.split(".")[:2])
