"""A checkpoint on the disk: its header, its index, and the tables of its shard files, each checked when read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minka.checkpoint.filesystem import LOCAL, FileSystem
from minka.checkpoint.index import INDEX, Index, ShardEntry, StoredPiece, Table, build_index, table_name
from minka.checkpoint.manifest import NAME, Damage, Header, parse, read_header, read_sealed


class StoredCheckpoint:
    """The checkpoint `path`, of any format. Every method raises OSError and Damage.

    `header` is that of this checkpoint, where it has been read already. `alive` is called for each chunk read.
    """

    def __init__(
        self,
        path: Path,
        fs: FileSystem = LOCAL,
        alive: Callable[[], None] = lambda: None,
        header: Header | None = None,
    ) -> None:
        self.path, self.fs, self.alive = path, fs, alive
        self.header = header or read_header(path, fs)
        self._old_tables: Mapping[str, Table] = {}
        if self.header.index:
            file = path / INDEX
            self.index = parse(Index, read_sealed(file, self.header.index, fs), file)
        else:
            self.index, self._old_tables = _old_tables(self.header.old_tables, path / NAME)

    def table(self, shard: str) -> Table:
        """What the shard file of this name holds."""
        entry, file = self.index.files[shard], self.path / table_name(shard)
        table = parse(Table, read_sealed(file, entry.table, self.fs), file) if entry.table else self._old_tables[shard]
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
        for name in sorted(listed ^ found):
            raise Damage(f"{self.path / name} {'is missing' if name in listed else 'is not part of this checkpoint'}")
        for name, expected in sizes.items():
            size = self.fs.size(self.path / name)
            if size != expected:
                raise Damage(f"{self.path / name} has {size:,} bytes instead of {expected:,}")


def _old_tables(old: Any, file: Path) -> tuple[Index, dict[str, Table]]:
    """Index and tables of a checkpoint of format 1 or 2, from the tables in its manifest `file`. Raises Damage."""
    try:
        tables = {name: Table(**entry, pieces={}) for name, entry in old["files"].items()}
        for name, tensor in old["tensors"].items():
            for piece in tensor["pieces"]:
                key, pieces = piece.get("key", name), tables[piece["file"]].pieces
                if key in pieces:
                    raise ValueError(f"{key} is twice in {piece['file']}")
                box = {"offset": piece["offset"], "size": piece["size"]}
                pieces[key] = StoredPiece(dtype=tensor["dtype"], shape=tensor["shape"], **box)
        index = build_index((n, ShardEntry(bytes=t.bytes, table=None), t) for n, t in tables.items())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Damage(f"{file}: its tables are wrong: {str(error)[:200]}") from None
    return index, tables
