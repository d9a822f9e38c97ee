"""What this rank's part of the model is fed of a micro-batch: its tokens of each sequence, and which see which."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minka.model.attention import Structure, document_structure
from minka.parallel.context import part_structure, places
from minka.parallel.mesh import Mesh
from minka.parallel.precision import compute_dtype
from minka.plan.config import RunConfig


class Fed(NamedTuple):
    """Of the sequences [B, T / context] that this rank has a part of; `targets` is None where nothing is to be lost."""

    tokens: Tensor
    positions: Tensor
    structure: Structure
    targets: Tensor | None


class Feeder:
    """Cuts micro-batches for one rank, and puts together what the ranks of a sequence's parts have found."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self.kernels, self.mesh, self.dtype = config.kernels, mesh, compute_dtype(config, mesh)
        self.ways, self.part = mesh.layout.context, mesh.coordinate["context"]

    def __call__(
        self, tokens: Tensor, documents: Tensor | None, positions: Tensor, targets: Tensor | None = None
    ) -> Fed:
        """All int64 [B, T] of whole sequences, documents=None for one document a row."""
        device, length = self.mesh.device, tokens.shape[1]
        if self.ways == 1:
            structure = document_structure(documents, self.kernels, device=device, dtype=self.dtype)
            return Fed(tokens, positions, structure, targets)
        documents = torch.zeros_like(tokens) if documents is None else documents
        structure = part_structure(documents, length, self.mesh.context, self.kernels, device, self.dtype)
        mine = places(length, self.ways, self.part).to(tokens.device)
        return Fed(tokens[:, mine], positions[:, mine], structure, None if targets is None else targets[:, mine])

    def spread(self, part: Tensor, length: int) -> Tensor:
        """[B, T / context] of this rank at its places in [B, T], 0 at the others'."""
        if self.ways == 1:
            return part
        whole = part.new_zeros(part.shape[0], length)
        whole[:, places(length, self.ways, self.part).to(part.device)] = part
        return whole

    def one_row(self, tokens: Tensor, place: int) -> tuple[Fed, int | None]:
        """A row [1, T] that is one document, and where this rank has the token at `place`; None: another rank has it.

        Padded on the right, which a causal model cannot see, to a length that can be cut.
        """
        layout = self.mesh.layout
        tokens = F.pad(tokens, (0, -tokens.shape[1] % (2 * layout.context * layout.tensor)))
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
        fed = self(tokens, None, positions)
        if self.ways == 1:
            return fed, place
        at = (places(length, self.ways, self.part) == place).nonzero().flatten().tolist()
        return fed, at[0] if at else None
