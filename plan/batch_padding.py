"""Padding sequences: given to ranks where a batch has too few sequences. They have no targets, and cost time."""

from minka.plan.config import RunConfig
from minka.plan.layout import Layout, counted


def padding_share(config: RunConfig, layout: Layout) -> float:
    """Return the share of a whole batch's computation that a resolved layout spends on padding sequences."""
    sequences, at_once = config.data.batch_tokens // config.data.seq_len, layout.data_ways * layout.micro_batch
    return 1 - sequences / (-(-sequences // at_once) * at_once)


def describe_padding(config: RunConfig, layout: Layout) -> str:
    """Return a warning where padding takes 1 % of the work or more; else an empty string."""
    share, at_once = padding_share(config, layout), layout.data_ways * layout.micro_batch
    if share < 0.01:
        return ""
    sequences = config.data.batch_tokens // config.data.seq_len
    return (
        f"note: {share:.0%} of each step is spent on padding sequences: a batch of {counted(sequences, 'sequence')} is "
        f"taken {at_once:,} at a time ({counted(layout.data_ways, 'data rank')} x micro_batch {layout.micro_batch})"
    )
