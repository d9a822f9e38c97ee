"""The version of minka, installed or not."""

import importlib.metadata
import tomllib
from pathlib import Path


def version() -> str:
    """Return the installed version, or the version of this source tree."""
    try:
        return importlib.metadata.version("minka")
    except importlib.metadata.PackageNotFoundError:
        pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return str(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"])
