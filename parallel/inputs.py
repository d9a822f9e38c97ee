"""From micro-batches to what this rank's part of the model takes: its tokens of each sequence, and their structure.

Micro-batches are cut on the host, so that the loader's thread can do it and no device is waited for.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minka.kernels.choose import Kernels, Provider
from minka.model.attention import Structure, document_structure, map_tensors
from minka.parallel.choose_kernels import kernels_of
from minka.parallel.context import places, shard_structure
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig


class MicroBatch(Protocol):
    """Whole sequences on the host: int64 tensors [B, T]."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def documents(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...


@dataclass(frozen=True)
class ModelInputs:
    """This rank's tokens of some sequences, [B, T / context], on the host until `to`; targets=None asks for logits."""

    tokens: Tensor
    positions: Tensor
    structure: Structure
    targets: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "ModelInputs":
        """The inputs of a model that computes in `dtype` on `device`."""
        tokens, positions = (t.to(device, non_blocking=True) for t in (self.tokens, self.positions))
        targets = None if self.targets is None else self.targets.to(device, non_blocking=True)
        return ModelInputs(tokens, positions, self.structure.to(device, dtype), targets)


class InputCutter:
    """Cuts micro-batches for one rank, and puts losses of its tokens back into whole rows.

    varlen: whether attention runs variable-length kernels, and provider: whose.
    """

    def __init__(self, mesh: Mesh, *, varlen: bool, provider: Provider = "varlen", as_gpu: bool = False) -> None:
        self.mesh, self.varlen = mesh, varlen
        self._how: dict[str, Any] = {"varlen": varlen, "provider": provider, "as_gpu": as_gpu}
        self.ways, self.rank = mesh.layout.context, mesh.coordinate["context"]

    @classmethod
    def of(cls, config: RunConfig, mesh: Mesh) -> "InputCutter":
        """The cutter of a run."""
        return cls.over(mesh, kernels_of(config, mesh))

    @classmethod
    def over(cls, mesh: Mesh, kernels: Kernels, *, as_gpu: bool = False) -> "InputCutter":
        """The cutter for attention by these kernels; as_gpu: as on a GPU, on any device."""
        return cls(mesh, varlen=kernels.attention != "sdpa", provider=kernels.attention, as_gpu=as_gpu)

    def prepare(self, micro_batch: MicroBatch) -> ModelInputs:
        """The inputs on the host, page-locked where the device is a GPU. Safe to call from any thread."""
        b = micro_batch
        inputs = self._cut(b.tokens, b.documents, b.positions, b.targets)
        if self.mesh.device.type != "cuda":
            return inputs
        with torch.cuda.device(self.mesh.device):  # each thread has its own current device, and pinning uses it
            return map_tensors(inputs, Tensor.pin_memory)

    def prepare_row(self, tokens: Tensor, place: int) -> tuple[ModelInputs, int | None]:
        """A row [1, T] that is one document, and where this rank has the token at `place`; None: not on this rank.

        Padded on the right, which a causal model cannot see, to a length that can be cut.
        """
        layout = self.mesh.layout
        tokens = F.pad(tokens, (0, -tokens.shape[1] % (2 * layout.context * layout.tensor)))
        length = tokens.shape[1]
        inputs = self._cut(tokens, None, torch.arange(length).expand_as(tokens), None)
        mine = places(length, self.ways, self.rank).tolist() if self.ways > 1 else range(length)
        return inputs, mine.index(place) if place in mine else None

    def whole_rows(self, mine: Tensor, length: int) -> Tensor:
        """[B, T / context] of this rank at its places in [B, T], 0 at those of other ranks."""
        if self.ways == 1:
            return mine
        rows = mine.new_zeros(mine.shape[0], length)
        rows[:, places(length, self.ways, self.rank).to(mine.device, non_blocking=True)] = mine
        return rows

    def _cut(self, tokens: Tensor, documents: Tensor | None, positions: Tensor, targets: Tensor | None) -> ModelInputs:
        if self.ways == 1:
            return ModelInputs(tokens, positions, document_structure(documents, **self._how), targets)
        documents = torch.zeros_like(tokens) if documents is None else documents
        structure = shard_structure(documents, self.mesh.context, **self._how)
        mine = places(tokens.shape[1], self.ways, self.rank)
        return ModelInputs(
            tokens[:, mine], positions[:, mine], structure, None if targets is None else targets[:, mine]
        )
