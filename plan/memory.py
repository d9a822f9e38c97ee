"""What a rank's memory is spent on: one list of kinds, for whatever predicts, measures or prints it."""

from types import MappingProxyType

# In the order they are printed. A byte is of exactly one kind: parallel/memory_trace.py says who wins.
MEANING = MappingProxyType(
    {
        "weights": "this rank's own pieces of the parameters",
        "gradients": "of parameters: whole as backward makes them, accumulated, in the buffers they are reduced in, "
        "and as the pieces that the optimizer reads",
        "optimizer": "moments and step count",
        "activations": "saved in forward (or when it is run again) for backward",
        "gathered": "put together from several ranks: FSDP's whole weights and their buffers, keys and values under "
        "context parallelism, hidden states under tensor parallelism",
        "logits": "a chunk of logits and what is computed from it",
        "workspace": "everything else, short-lived: between two operations, or on its way",
    }
)
KINDS = tuple(MEANING)
