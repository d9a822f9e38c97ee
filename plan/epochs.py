"""How often a run reads its training tokens."""

FULL_VALUE_EPOCHS = 4  # read so often, tokens are worth almost as much as new ones (Muennighoff et al. 2023)


def describe_epochs(tokens: int, stored: int) -> str:
    """Return a warning where a run of `tokens` reads a store of `stored` training tokens more than four times."""
    epochs = tokens / stored
    if epochs <= FULL_VALUE_EPOCHS:
        return ""
    return (
        f"note: the run reads its {stored:,} training tokens {epochs:,.1f} times; beyond {FULL_VALUE_EPOCHS} epochs, "
        "repeated tokens are worth less and less (arXiv:2305.16264): more text, or a shorter run"
    )
