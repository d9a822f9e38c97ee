"""What ran, on what, from what: commit, packages, hardware, data, command line. Written once, to provenance.json."""

import importlib.metadata
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from minka.data.token_store import TokenStore
from minka.plan.config import RunConfig
from minka.plan.run_folder import RunFolder
from minka.plan.version import version

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("minka", "torch", "numpy", "tokenizers", "transformers", "datasets", "pyarrow", "safetensors", "triton")


def provenance(config: RunConfig, store: TokenStore, command: Sequence[str]) -> dict[str, object]:
    """Return the contents of provenance.json, with a new id for the run. No environment: it can hold secrets."""
    return {
        "format": 1,
        "id": secrets.token_hex(8),
        "time": time.time(),
        "command": list(command),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain"),
        "python": sys.version,
        "packages": versions(*PACKAGES),
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "host": platform.node(),
        },
        "base": {"relative": os.path.relpath(Path.cwd(), RunFolder.of(config).path.resolve()), "absolute": os.getcwd()},
        "data": {"store": str(store.folder.resolve()), "manifest_sha256": store.hash},
        "seed": config.run.seed,
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Return the installed version of each package, None where it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = version() if name == "minka" else importlib.metadata.version(name)
    return found


def processor() -> str:
    """Return the CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """Return git's output on minka's own repository; None where minka is installed inside a different one."""
    if not (ROOT / ".git").exists():  # a file in a worktree
        return None
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()
    except (OSError, subprocess.SubprocessError):
        return None
