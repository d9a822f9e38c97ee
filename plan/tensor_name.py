"""The names of a rank's pieces of tensors, as checkpoints have them."""


def tensor_name(key: str) -> str:
    """The tensor that a key of pieces is a box of. Where a rank holds several they are NAME, NAME#1, NAME#2."""
    return key.partition("#")[0]
