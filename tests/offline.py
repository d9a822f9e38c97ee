"""Compiles kernels for a GPU that is not here, and reads from the binary what they would use there.

ptxas and cuobjdump come with triton's wheel. Not for a process that interprets kernels.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
CAPABILITIES = (80, 90)
SHARED_LIMIT = 227 * 1024  # bytes of shared memory that a block may have on Hopper


class Compiled(NamedTuple):
    registers: int  # of a thread
    stack: int  # bytes of a thread: spilled registers
    shared: int  # bytes of a block
    ptx: str
    ttir: str

    def check(self) -> None:
        """No spills, shared memory within the limit, offsets of rows in 64 bits."""
        assert self.stack == 0, f"{self.stack} bytes of stack: registers are spilled"
        assert self.shared <= SHARED_LIMIT, f"{self.shared} bytes of shared memory"
        assert not narrow_products(self.ttir), narrow_products(self.ttir)

    def tensor_cores(self, capability: int) -> bool:
        """Whether products run on tensor cores: wgmma on Hopper, mma before."""
        return bool(re.search(r"wgmma\.mma_async" if capability >= 90 else r"mma\.sync", self.ptx))


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    warps: int = 4,
    stages: int = 3,
    aligned: tuple[str, ...] = (),
) -> Compiled:
    """types: of each argument that is not a constant, such as *bf16, i32, fp32. aligned: those divisible by 16."""
    names = kernel.arg_names
    missing = [name for name in names if name not in types and name not in constants]
    assert not missing, f"no type for {missing}"
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = {kind: int(n) for kind, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    stack = found["STACK"] + found["LOCAL"]
    return Compiled(found["REG"], stack, built.metadata.shared, built.asm["ptx"], built.asm["ttir"])


def narrow_products(ttir: str) -> list[str]:
    """Products of a program's number, or of what follows from it, with a size or stride, that are not in 64 bits.

    Such an offset wraps around beyond 2^31 elements. Products with constants are tiles of a row: those are small.
    """
    follows, constants, found = set[str](), set[str](), []
    for line in ttir.splitlines():
        match = re.match(r"\s*(%[\w]+)(?::\d+)? = ([\w.]+)", line)
        if match is None:
            continue
        result, operation = match.groups()
        used = set(re.findall(r"%\w+", line.split("=", 1)[1]))
        if operation == "tt.get_program_id" or used & follows:
            follows.add(result)
        if operation == "arith.constant" or (operation in ("tt.splat", "arith.extsi") and used <= constants):
            constants.add(result)
        narrow = operation == "arith.muli" and "i64" not in line.rsplit(":", 1)[1]
        if narrow and used & follows and not used & constants:
            found.append(line.strip())
    return found
