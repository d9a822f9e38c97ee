"""A checkpoint on the disk: its header, its index, and the tables of its shard files, each checked when read."""

from itertools import chain
from pathlib import Path
from typing import Any

from minka.checkpoint.filesystem import LOCAL, FileSystem, Heartbeat
from minka.checkpoint.index import INDEX, Index, PieceGroup, Table, build_index, shard_name, table_name
from minka.checkpoint.manifest import NAME, Damage, Sealed, parse_model, read_header, read_sealed


class StoredCheckpoint:
    """The checkpoint `path`, of any format. Every method raises OSError and Damage."""

    def __init__(self, path: Path, fs: FileSystem = LOCAL, alive: Heartbeat = lambda: None) -> None:
        self.path, self.fs, self.alive = path, fs, alive
        self.header = read_header(path, fs)
        if self.header.index:
            file = path / INDEX
            self._tables: list[Table] = []
            self.index = parse_model(Index, read_sealed(file, self.header.index, fs), file)
            if len(self.index.table_bytes) != len(self.index.bytes):
                raise Damage(f"{file}: shard files without a table")
        else:
            self._tables, self.index = _old_tables(self.header.old_tables, path / NAME)

    def table(self, rank: int) -> Table:
        """What a rank has written."""
        if self._tables:
            return self._tables[rank]
        file, index = self.path / table_name(rank), self.index
        seal = Sealed(bytes=index.table_bytes[rank], sha256=index.table_sha256[rank])
        table = parse_model(Table, read_sealed(file, seal, self.fs), file)
        if table.bytes != index.bytes[rank]:
            raise Damage(f"{file} is of {table.bytes:,} bytes; the index has {index.bytes[rank]:,}")
        return table

    def check_files(self) -> None:
        """Raises Damage (or OSError) that names a file that is missing, cut, not a regular file, or not listed."""
        sizes = {shard_name(rank): size for rank, size in enumerate(self.index.bytes)}
        sizes |= {table_name(rank): size for rank, size in enumerate(self.index.table_bytes)}
        listed = sizes.keys() | {NAME, *([INDEX] if self.header.index else [])}
        found = {name for name in self.fs.listdir(self.path) if not name.startswith(".")}  # .nfs0001: made by NFS
        for name in sorted(listed ^ found):
            raise Damage(f"{self.path / name} {'is missing' if name in listed else 'is not part of this checkpoint'}")
        for name, expected in sizes.items():
            size = self.fs.size(self.path / name)
            if size != expected:
                raise Damage(f"{self.path / name} has {size:,} bytes instead of {expected:,}")


def _old_tables(old: Any, file: Path) -> tuple[list[Table], Index]:
    """The tables of a checkpoint of format 1 or 2, from those in its manifest `file`. Raises Damage."""
    try:
        # By box, since there are millions of pieces and many of a file are the same box of tensors of one shape.
        files: dict[str, dict[Any, list[str]]] = {shard_name(rank): {} for rank in range(len(old["files"]))}
        for name, tensor in old["tensors"].items():
            for piece in tensor["pieces"]:
                box = tensor["dtype"], *map(tuple, (tensor["shape"], piece["offset"], piece["size"]))
                files[piece["file"]].setdefault(box, []).append(piece.get("key", name))
        tables = []
        for file_name, boxes in files.items():
            groups = [
                PieceGroup(dtype=dtype, shape=list(shape), offset=list(offset), size=list(size), keys=keys)
                for (dtype, shape, offset, size), keys in boxes.items()
            ]
            if len(set(chain(*boxes.values()))) < sum(map(len, boxes.values())):
                raise ValueError(f"{file_name} has a piece twice")
            tables.append(Table(**old["files"][file_name], groups=groups))
        return tables, build_index((table, None) for table in tables)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Damage(f"{file}: its tables are wrong: {str(error)[:200]}") from None
