"""The rules of mining against their formula, pair by pair."""

import numpy as np
import pytest

from qbatch.errors import ConfigError
from qbatch.training.negatives import NegativeRules, Positives


def make_rules(**settings) -> NegativeRules:
    defaults = {
        "first_rank": 2,
        "last_rank": 4,
        "max_ratio": 0.95,
        "margin": None,
        "max_positive_rank": None,
        "num_negatives": 2,
        "sampling": "random",
        "seed": 0,
    }
    return NegativeRules(**(defaults | settings))


def test_window_has_both_ends():
    assert make_rules().in_window(np.arange(1, 7)).tolist() == [
        *(False, True, True, True, False, False)
    ]


@pytest.mark.parametrize(
    ("max_ratio", "margin"), [(0.95, None), (None, 0.05), (0.9, 0.02), (None, None)]
)
def test_scores_against_the_formula(max_ratio, margin):
    rng = np.random.default_rng(0)
    scores, positive = rng.random((2, 300)).astype(np.float32)
    found = make_rules(max_ratio=max_ratio, margin=margin).below_positive(scores, positive)
    for score, best, is_below in zip(scores, positive, found, strict=True):
        assert is_below == (
            (max_ratio is None or score < max_ratio * best)
            and (margin is None or score < best - margin)
        )
    assert found.all() == (max_ratio is None and margin is None)


def test_a_pair_stays_if_its_positive_is_among_the_best():
    ranks = np.array([1, 3, 4, 90])
    assert make_rules(max_positive_rank=3).finds_positive(ranks).tolist() == [
        *(True, True, False, False)
    ]
    assert make_rules().finds_positive(ranks).all()


def test_order_is_by_rank_or_random_by_seed_and_pair():
    ranks = np.array([9, 3, 5, 7, 4])
    assert make_rules(sampling="top").look_order(ranks, 1).tolist() == [1, 4, 2, 3, 0]
    orders = {tuple(make_rules(seed=s).look_order(ranks, p)) for s in range(4) for p in range(4)}
    assert len(orders) > 8
    one = make_rules().look_order(ranks, 7)
    shuffled = [2, 0, 4, 1, 3]
    again = make_rules().look_order(ranks[shuffled], 7)
    assert ranks[one].tolist() == ranks[shuffled][again].tolist()


def test_positives_are_known_by_query_and_document_together():
    queries, documents = np.array([1, 1, 2], np.uint64), np.array([5, 6, 7], np.uint64)
    positives = Positives(queries, documents)
    asked = np.array([1, 1, 1, 2, 3], np.uint64), np.array([5, 6, 7, 7, 5], np.uint64)
    assert positives.contain(*asked).tolist() == [True, True, False, True, False]
    nothing = Positives(queries[:0], documents[:0])
    assert not nothing.contain(*asked).any()
    assert positives.fingerprint() != nothing.fingerprint()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first_rank": 0}, "first_rank is 0"),
        ({"first_rank": 9}, "first_rank is 9, last_rank 4"),
        ({"num_negatives": 0}, "num_negatives is 0"),
        ({"max_ratio": 1.5}, "max_ratio is 1.5"),
        ({"margin": -0.1}, "margin is -0.1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_rules_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_rules(**settings)
