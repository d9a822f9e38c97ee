"""What went wrong on one rank, told to all: the ledger is rank 0's, and must name the file that another rank read."""

from minka.parallel.mesh import Mesh

MOST_BYTES = 500  # of a message that travels


def heard(mesh: Mesh, problem: str) -> str:
    """This rank's problem, or the one of the first rank that has one; empty when none has. Collective."""
    (count,) = mesh.sum_on_host([bool(problem)])
    if not count:
        return ""
    having = mesh.sum_on_host([bool(problem) and rank == mesh.rank for rank in range(mesh.ranks)])
    first = having.index(1)
    mine = problem.encode()[:MOST_BYTES] if mesh.rank == first else b""
    said = bytes(mesh.sum_on_host(list(mine.ljust(MOST_BYTES, b"\0")))).rstrip(b"\0").decode(errors="replace")
    return problem or f"rank {first}: {said}"
