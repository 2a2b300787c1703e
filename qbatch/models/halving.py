"""A pack that does not fit into memory is computed in halves."""

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)


def in_halves(
    compute: Callable[[int, int], torch.Tensor],
    first: int,
    stop: int,
    shrink: Callable[[int, int], None],
) -> torch.Tensor:
    """Return the rows of the texts ``first`` to ``stop``, computed in one go if memory allows.

    Args:
        compute: Returns one row for each text of a range.
        first: Where the range begins.
        stop: Where it ends.
        shrink: Told of each range that did not fit.

    Raises:
        torch.OutOfMemoryError: Not even a single text fits.
    """
    try:
        return compute(first, stop)
    except torch.OutOfMemoryError:
        if stop - first == 1:
            raise
    # Outside the except clause: the error holds on to the tensors of the failed pass.
    shrink(first, stop)
    middle = (first + stop) // 2
    halves = ((first, middle), (middle, stop))
    return torch.cat([in_halves(compute, *half, shrink) for half in halves])


def shrunk_budget(token_budget: int, num_tokens: int) -> int:
    """Return the budget of later packs when one of ``num_tokens`` did not fit, with a warning."""
    token_budget = min(token_budget, max(1, num_tokens // 2))
    logger.warning(
        "A pack of %d tokens did not fit into memory; it is halved, and packs of later calls have "
        "at most %d",
        num_tokens,
        token_budget,
    )
    return token_budget
