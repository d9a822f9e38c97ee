"""Where a run comes from: commit, packages, hardware, data, command line. Written once, into provenance.json."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from minka.data.store import TokenStore
from minka.plan.config import RunConfig

PACKAGES = ("minka", "torch", "numpy", "tokenizers", "transformers", "datasets", "pyarrow", "safetensors", "triton")


def provenance(config: RunConfig, store: TokenStore) -> dict[str, object]:
    """Everything needed to say what ran, on what, from what; no secrets (the environment is left out)."""
    return {
        "format": 1,
        "time": time.time(),
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain"),
        "python": sys.version,
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "host": platform.node(),
        },
        "data": {"store": str(store.folder.resolve()), "manifest_sha256": store.hash},
        "seed": config.run.seed,
    }


def processor() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
