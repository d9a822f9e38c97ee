"""The staging buffer: as large as its file, and locked in memory where a GPU copies into it."""

from types import SimpleNamespace

import pytest
import torch

from minka.checkpoint.shard_file import StagingBuffer
from saved import tensors


@pytest.mark.parametrize("status", [0, 1])
def test_a_buffer_locks_its_own_bytes_for_as_long_as_it_lives(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls are recorded. torch's own pinned memory would be rounded up to a power of two of bytes."""
    locked: dict[int, int] = {}

    def lock(address: int, size: int, flags: int) -> int:
        locked[address] = size
        return status

    runtime = SimpleNamespace(cudaHostRegister=lock, cudaHostUnregister=locked.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    staged = StagingBuffer(tensors(), pinned=True)
    assert locked == {staged.buffer.data_ptr(): staged.buffer.numel()}
    staged.copy_in(tensors())
    (chunk,) = staged.chunks(2**20)
    del staged
    assert len(locked) == 1  # what is still written out is still locked
    del chunk
    assert len(locked) == status  # nothing to unlock where nothing could be locked
