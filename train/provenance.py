"""What ran, on what, from what: commit, packages, hardware, data, command line. Written once, to provenance.json."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

from minka.data.token_store import TokenStore
from minka.plan.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("minka", "torch", "numpy", "tokenizers", "transformers", "datasets", "pyarrow", "safetensors", "triton")


def provenance(config: RunConfig, store: TokenStore, command: Sequence[str]) -> dict[str, object]:
    """Return the contents of provenance.json. The environment is left out: it can hold secrets."""
    return {
        "format": 1,
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
        "data": {"store": str(store.folder.resolve()), "manifest_sha256": store.hash},
        "seed": config.run.seed,
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Return the installed version of each package, None where it is not installed."""
    return {name: _version(name) for name in packages}


def processor() -> str:
    """Return the CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        source = ROOT / "pyproject.toml"
        if name != "minka" or not source.exists():
            return None
        return str(tomllib.loads(source.read_text(encoding="utf-8"))["project"]["version"])


def _git(*arguments: str) -> str | None:
    """Return git's output on minka's own repository; None where minka is installed inside a different one."""
    if not (ROOT / ".git").exists():  # a file in a worktree
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
