"""Choosing items that are good and unlike each other, for many queries at once."""

import numpy as np


def diversify(
    relevance: np.ndarray, similarity: np.ndarray, *, top_k: int, diversity: float
) -> np.ndarray:
    """Return which candidates to take, in order, by maximal marginal relevance.

    The next one is the candidate with the highest
    ``(1 - diversity) * relevance - diversity * (highest similarity to one taken already)``;
    equal ones are taken in the order of the candidates. Carbonell and Goldstein, "The Use of MMR,
    Diversity-Based Reranking for Reordering Documents and Producing Summaries", SIGIR 1998, whose
    lambda is ``1 - diversity``.

    Args:
        relevance: float32, (queries, candidates); -inf where there is no candidate.
        similarity: float32, (queries, candidates, candidates), between candidates.
        top_k: How many to take.
        diversity: From 0, only relevance counts, to 1.

    Returns:
        int64, (queries, up to top_k): places of candidates, -1 when there are no more.
    """
    num_queries, num_candidates = relevance.shape
    chosen = np.full((num_queries, min(top_k, num_candidates)), -1, np.int64)
    is_free = np.isfinite(relevance)
    gain_alone = (1 - diversity) * np.where(is_free, relevance, 0).astype(np.float64)
    closest = np.full(relevance.shape, -np.inf)
    queries = np.arange(num_queries)
    for step in range(chosen.shape[1]):
        penalty = diversity * closest if step else 0.0
        gain = np.where(is_free, gain_alone - penalty, -np.inf)
        best = gain.argmax(axis=1)
        is_found = is_free[queries, best]
        chosen[is_found, step] = best[is_found]
        is_free[queries, best] = False
        closest = np.maximum(closest, similarity[queries, best])
    return chosen
