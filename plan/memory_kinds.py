"""The kinds of memory of a rank: one list, for everything that predicts, measures or prints it."""

# In the order they are printed. A byte is of exactly one kind: parallel/memory_trace.py says which kind wins.
MEMORY_KINDS = (
    "weights",  # this rank's own pieces of the parameters
    "gradients",  # whole during backward, accumulated, in the buffers they are reduced in, and as reduced pieces
    "optimizer",  # moments and step count
    "activations",  # saved for backward, in forward or when forward is recomputed
    "gathered",  # FSDP's whole weights and buffers, context parallelism's keys and values, tensor's hidden states
    "logits",  # a chunk of logits and what is computed from it
    "workspace",  # everything else, short-lived: between two operations, or on its way
)
