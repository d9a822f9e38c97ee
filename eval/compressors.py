"""What everyday compressors make of the held-out documents: a yardstick for bits per byte that needs no model."""

import lzma
import zlib
from collections.abc import Iterable

MOST_BYTES = 64 * 2**20  # xz -9 takes about a second a megabyte


def compressed_bits_per_byte(documents: Iterable[bytes]) -> dict[str, float]:
    """`zlib -9` of each document by itself, and `xz -9` of all of them in one piece; 8 * compressed / plain.

    The second sees the other documents, as a model sees its training data; the first starts from nothing each time.
    """
    documents = [d for d in documents if d]
    plain = sum(map(len, documents))
    if not plain or plain > MOST_BYTES:
        return {}
    alone = sum(len(zlib.compress(d, 9)) for d in documents)
    together = len(lzma.compress(b"".join(documents), preset=9))
    return {"zlib -9, each document": 8 * alone / plain, "xz -9, all in one": 8 * together / plain}
