"""What general compressors achieve on the held-out documents: a baseline for bits per byte that needs no model."""

import lzma
import zlib
from collections.abc import Iterable

MAX_BYTES = 64 * 2**20  # xz -9 takes about a second a megabyte


def compressed_bits_per_byte(documents: Iterable[bytes]) -> dict[str, float]:
    """Return 8 * compressed / plain bytes for `zlib -9` of each document and `xz -9` of all documents in one piece.

    zlib starts from nothing at each document. xz sees the other documents, as a model sees its training data.
    Empty if there are no bytes, or more than MAX_BYTES.
    """
    documents = [d for d in documents if d]
    plain = sum(map(len, documents))
    if not plain or plain > MAX_BYTES:
        return {}
    separate = sum(len(zlib.compress(d, 9)) for d in documents)
    together = len(lzma.compress(b"".join(documents), preset=9))
    return {"zlib -9, each document": 8 * separate / plain, "xz -9, all in one": 8 * together / plain}
