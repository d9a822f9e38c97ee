"""What the commands of this folder refuse before they measure anything; each with argparse's usage and status 2."""

import argparse
from collections.abc import Iterable

import torch


def require_gpu(parser: argparse.ArgumentParser, *, tiny: bool) -> None:
    """Refuse sizes that are not tiny where there is no GPU: on a CPU they take hours, and measure nothing of use."""
    if not tiny and not torch.cuda.is_available():
        parser.error("needs a GPU; --tiny runs anywhere")


def require_one(parser: argparse.ArgumentParser, only: str, names: Iterable[str]) -> None:
    """Refuse an --only that none of `names` contains: an empty table would look like a success."""
    known = list(dict.fromkeys(names))
    if not any(only in name for name in known):
        parser.error(f"no name contains --only {only!r}; the names are: {'; '.join(known)}")
