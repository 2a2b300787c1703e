"""Which texts share one forward pass: sorted by length and filled to a token budget.

A pack is made of segments of tokens. A segment is a whole text, or it continues an earlier one, its
parent: what texts begin with in common is then one segment, computed once.
"""

import numpy as np


def plan_packs(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Return packs of text indices, longest texts first, each of at most ``token_budget`` tokens.

    Sorting makes equal lengths neighbours, and starting with the longest meets an out-of-memory at
    once. Ties keep their order, so the same lengths always give the same packs.

    Args:
        lengths: Tokens of each text, all at least 1.
        token_budget: Upper bound of tokens in a pack; a longer text is a pack of its own.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    ends = np.cumsum(lengths[order], dtype=np.int64)
    packs = []
    first = filled = 0
    while first < len(order):
        stop = int(np.searchsorted(ends, filled + token_budget, side="right"))
        stop = max(stop, first + 1)
        packs.append(order[first:stop])
        first, filled = stop, int(ends[stop - 1])
    return packs


def equal_runs(lengths: np.ndarray, parents: np.ndarray | None = None) -> list[tuple[int, int]]:
    """Return (length, count) of each run of neighbours with equal length and equal parent."""
    changes = np.diff(lengths, prepend=-1) != 0
    if parents is not None:
        changes |= np.diff(parents, prepend=-2) != 0
    starts = np.flatnonzero(changes)
    counts = np.diff(starts, append=len(lengths))
    return list(zip(lengths[starts].tolist(), counts.tolist(), strict=True))


def gather_tokens(
    ids: np.ndarray, lengths: np.ndarray, order: np.ndarray, skip: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of the texts named in ``order``, and the position of each in its text.

    Args:
        ids: All texts one after the other, shape (sum of ``lengths``,).
        lengths: Tokens of each text.
        order: Indices of texts, any subset in any order.
        skip: Tokens left out at the start of each text, fewer than any has.
    """
    sources = np.cumsum(lengths, dtype=np.int64) - lengths
    taken = lengths[order] - skip
    targets = np.cumsum(taken, dtype=np.int64) - taken
    positions = np.arange(taken.sum()) - np.repeat(targets, taken) + skip
    return ids[np.repeat(sources[order], taken) + positions], positions


def common_prefix(ids: np.ndarray, lengths: np.ndarray) -> int:
    """Return how many tokens all texts begin with in common, leaving each at least one of its own.

    Args:
        ids: All texts one after the other, shape (sum of ``lengths``,).
        lengths: Tokens of each text.
    """
    if len(lengths) == 0:
        return 0
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    longest = max(0, int(lengths.min()) - 1)
    differ = (i for i in range(longest) if (ids[starts + i] != ids[i]).any())
    return next(differ, longest)


def distinct_texts(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(first, inverse)``: where each distinct text first occurs, and which one each is.

    ``first[inverse[i]]`` is the first text with the same tokens as text ``i``.
    """
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    seen: dict[bytes, int] = {}
    inverse = np.empty(len(lengths), np.int64)
    first: list[int] = []
    start = 0
    for row, end in enumerate(ends):
        number = seen.setdefault(ids[start:end].tobytes(), len(first))
        if number == len(first):
            first.append(row)
        inverse[row] = number
        start = end
    return np.array(first, np.int64), inverse
