"""Fillers: what ranks are given where a batch has no more sequences; they have no targets, and cost time."""

from minka.plan.layout import Asked


def filler_share(asked: Asked) -> float:
    """Of what the ranks compute for a whole batch, the part that is for nothing, since the batch has no more sequences.

    For a layout that is resolved.
    """
    layout, data = asked.layout, asked.data
    sequences, at_once = data.batch_tokens // data.seq_len, layout.data_ways * layout.micro_batch
    return 1 - sequences / (-(-sequences // at_once) * at_once)


def told_fillers(asked: Asked) -> str:
    """A warning, where a hundredth or more of the work is for nothing; else empty."""
    share, layout = filler_share(asked), asked.layout
    if share < 0.01:
        return ""
    sequences = asked.data.batch_tokens // asked.data.seq_len
    return (
        f"note: {share:.0%} of each step is spent on fillers: {layout.data_ways:,} data ranks take "
        f"{layout.data_ways * layout.micro_batch:,} sequences at once, and a batch has {sequences:,}"
    )
