"""A committed checkpoint on the disk: its header, its index, and the tables of its shard files, each checked when read."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from minka.checkpoint.filesystem import LOCAL, FileSystem
from minka.checkpoint.index import INDEX, Dtype, Index, ShardEntry, ShardName, StoredPiece, Table, build_index
from minka.checkpoint.manifest import (
    NAME,
    Count,
    Damage,
    Header,
    StrictModel,
    parse,
    read_header,
    read_manifest,
    read_old,
    read_sealed,
)


class StoredCheckpoint:
    """The checkpoint `path`, of any format. Every method raises OSError and Damage.

    `header` is that of this checkpoint, where it has been read already.
    """

    def __init__(self, path: Path, fs: FileSystem = LOCAL, header: Header | None = None) -> None:
        self.path, self.fs = path, fs
        self.header = header or read_header(path, fs)
        self._tables: Mapping[str, Table] = {}  # of formats 1 and 2, which have them in the manifest
        if self.header.index:
            file = path / INDEX
            self.index = parse(Index, read_sealed(file, self.header.index, fs), file)
        else:
            self.index, self._tables = read_old_tables(path, fs)

    def table(self, shard: str) -> Table:
        """What the shard file of this name holds."""
        entry, file = self.index.files[shard], self.path / table_name(shard)
        table = parse(Table, read_sealed(file, entry.table, self.fs), file) if entry.table else self._tables[shard]
        chunk = self.header.chunk_bytes
        if table.bytes != entry.bytes or len(table.sha256) != -(-table.bytes // chunk):
            hashes = f"{len(table.sha256)} hashes for {table.bytes:,} bytes in chunks of {chunk:,}"
            raise Damage(f"{file}: {hashes}; the index has {entry.bytes:,} bytes")
        return table

    def check_files(self) -> None:
        """Raises Damage (or OSError) that names a file that is missing, cut, not a regular file, or not listed."""
        sizes = {shard: entry.bytes for shard, entry in self.index.files.items()}
        sizes |= {table_name(s): entry.table.bytes for s, entry in self.index.files.items() if entry.table}
        listed = sizes.keys() | {NAME, *([INDEX] if self.header.index else [])}
        found = {name for name in self.fs.listdir(self.path) if not name.startswith(".")}  # .nfs0001: made by NFS
        for name in sorted(listed - found):
            raise Damage(f"{self.path / name} is missing")
        for name in sorted(found - listed):
            raise Damage(f"{self.path / name} does not belong to this checkpoint")
        for name, expected in sizes.items():
            size = self.fs.size(self.path / name)
            if size != expected:
                raise Damage(f"{self.path / name} has {size:,} bytes instead of {expected:,}")


def table_name(shard: str) -> str:
    """The file with the table of a shard file."""
    return shard.replace(".safetensors", ".json")


class _OldPiece(StrictModel):
    file: str
    key: str | None = None
    offset: list[Count]
    size: list[Count]


class _OldTensor(StrictModel):
    dtype: Dtype
    shape: list[Count]
    pieces: list[_OldPiece]


class _OldFile(StrictModel):
    bytes: Count
    sha256: list[str]


class _OldTables(BaseModel, strict=True):
    """What a manifest of format 1 or 2 has in addition to the header."""

    files: dict[ShardName, _OldFile]
    tensors: dict[str, _OldTensor]


def read_old_tables(path: Path, fs: FileSystem) -> tuple[Index, dict[str, Table]]:
    """Index and tables of a checkpoint of format 1 or 2. Raises OSError and Damage."""
    file = path / NAME
    old = parse(_OldTables, read_old(read_manifest(path, fs), file), file)
    tables = {name: Table(bytes=entry.bytes, sha256=entry.sha256, pieces={}) for name, entry in old.files.items()}
    try:
        for name, tensor in old.tensors.items():
            for piece in tensor.pieces:
                key, pieces = piece.key or name, tables[piece.file].pieces
                if key in pieces:
                    raise ValueError(f"{key} is twice in {piece.file}")
                pieces[key] = StoredPiece(dtype=tensor.dtype, shape=tensor.shape, offset=piece.offset, size=piece.size)
        index = build_index((n, ShardEntry(bytes=t.bytes, table=None), t) for n, t in tables.items())
    except (KeyError, ValueError) as error:
        raise Damage(f"{file}: {str(error)[:200]}") from None
    return index, tables
