"""A claim of `make bench`: what is measured, in which unit, and the bound that must hold."""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from minka.benchmarks.options import require_one
from minka.plan.cli import print_json, print_table


class Claim(NamedTuple):
    """One row of the table."""

    name: str
    measure: Callable[[], float]
    bound: float
    unit: str
    larger_is_better: bool = False

    def holds(self, value: float, slack: float = 1.0) -> bool:
        """Return whether `value` keeps the share `slack` of the bound."""
        if self.larger_is_better:
            return value >= slack * self.bound
        return value <= self.bound / slack


def check_claims(about: str, claims: Sequence[Claim]) -> int:
    """A command that measures claims and prints a table of them: return 1 when a bound is broken."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--only", default="", help="check the claims whose name contains this")
    parser.add_argument("--slack", type=float, default=1.0, help="share of each bound that must be kept")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    require_one(parser, options.only, (claim.name for claim in claims))
    found = []
    for claim in claims:
        if options.only in claim.name:
            value = claim.measure()
            found.append((claim, value))
            print(f"{claim.name}: {value:.4g}", file=sys.stderr, flush=True)
    if options.json:
        print_json([_as_dict(claim, value) for claim, value in found])
    else:
        print_table([_row(claim, value) for claim, value in found], ["claim", "measured", "bound", ""])
    return 0 if all(claim.holds(value, options.slack) for claim, value in found) else 1


def _as_dict(claim: Claim, value: float) -> dict[str, object]:
    fields = {name: field for name, field in claim._asdict().items() if name != "measure"}
    return fields | {"value": value, "kept": claim.holds(value)}


def _row(claim: Claim, value: float) -> tuple[str, ...]:
    sign = ">=" if claim.larger_is_better else "<="
    kept = "" if claim.holds(value) else "BROKEN"
    return claim.name, f"{value:.4g} {claim.unit}", f"{sign} {claim.bound:g} {claim.unit}", kept


def median_ratio(ours: Callable[[], float], peer: Callable[[], float], pairs: int) -> float:
    """Return the median of our seconds / the peer's seconds over pairs. Each side goes first in turn."""
    ratios = []
    for pair in range(pairs):
        first, second = (ours, peer) if pair % 2 == 0 else (peer, ours)
        a, b = first(), second()
        ratios.append(a / b if pair % 2 == 0 else b / a)
    return statistics.median(ratios)
