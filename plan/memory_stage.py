"""A part of the model on a rank: all of it, or the layers of one pipeline stage. What it holds whatever runs."""

from minka.plan.execution_choices import frees_gathered_weights, fsdp_units
from minka.plan.memory_block import BlockMemory, Matrix, sizes


class Stage:
    """`layers` blocks, with the embedding if it is the first stage, and with final norm and head if it is the last.

    FSDP gathers them in units of `unit` blocks at most; what is in none, `root`, is a unit of its own.
    """

    def __init__(self, block: BlockMemory, layers: int, *, first: bool = True, last: bool = True) -> None:
        m = block.model
        self.block, self.layers, self.first, self.last = block, layers, first, last
        matrix = Matrix(block.vocab, block.d)
        ends = [matrix] * (first + (last and not (first and m.tied))) + [Matrix(block.d, 1)] * last
        units = fsdp_units([block.whole] * layers) if block.fsdp else []
        self.units = [len(unit) for unit in units]
        self.unit = max(self.units, default=0)
        self.kept = not frees_gathered_weights(block.layout, block.whole * layers)
        self.ends, self.ends_shards = sizes(ends), block.shards_of(ends)
        self.root = self.ends + (0 if units else layers * block.size)
        self.root_shards = self.ends_shards + (0 if units else layers * block.shards)

    @property
    def size(self) -> int:
        """Elements of its weights when they are gathered."""
        return self.ends + self.layers * self.block.size

    @property
    def shards(self) -> int:
        """Elements of its weights that the rank stores."""
        return self.ends_shards + self.layers * self.block.shards

    @property
    def matrix(self) -> int:
        """Elements of the vocabulary's matrix, of embedding or head."""
        return self.block.vocab * self.block.d

    @property
    def gathered(self) -> int:
        """Bytes of FSDP's whole weights during the loss, where it frees blocks after forward, and else of all."""
        if not self.block.fsdp:
            return 0
        return (self.size if self.kept else self.root) * self.block.c

    @property
    def unit_bytes(self) -> int:
        """Of the largest unit of blocks, gathered; 0 where nothing is gathered."""
        return self.unit * self.block.size * self.block.c if self.block.data > 1 else 0

    @property
    def buffer(self) -> int:
        """Bytes that the unit that was gathered last arrived in, which stay until the pass ends."""
        if not self.block.fsdp or self.block.data == 1:
            return 0
        return (self.unit * self.block.size if self.units else self.root) * self.block.c
