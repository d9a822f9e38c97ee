"""Fillers: what ranks are given where a batch has no more sequences; they have no targets, and cost time."""

from minka.plan.config import RunConfig
from minka.plan.layout import Layout, counted


def padding_share(config: RunConfig, layout: Layout) -> float:
    """Of what the ranks of a resolved layout compute in a whole batch, the part that is for nothing."""
    sequences, at_once = config.data.batch_tokens // config.data.seq_len, layout.data_ways * layout.micro_batch
    return 1 - sequences / (-(-sequences // at_once) * at_once)


def describe_padding(config: RunConfig, layout: Layout) -> str:
    """A warning, where a hundredth or more of the work is for nothing; else empty."""
    share, at_once = padding_share(config, layout), layout.data_ways * layout.micro_batch
    if share < 0.01:
        return ""
    sequences = config.data.batch_tokens // config.data.seq_len
    return (
        f"note: {share:.0%} of each step is spent on fillers: the {counted(sequences, 'sequence')} of a batch are "
        f"taken {at_once:,} at a time ({counted(layout.data_ways, 'data rank')} x micro_batch {layout.micro_batch})"
    )
