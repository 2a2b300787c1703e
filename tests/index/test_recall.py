"""Recall against its definition, and the choice of an effort."""

import numpy as np
import pytest

from qbatch.errors import QualityGateError
from qbatch.index.neighbours import Neighbours
from qbatch.index.recall import (
    CurvePoint,
    Recall,
    check_recall,
    choose_effort,
    recall_of_probes,
)


def lists(rows, scores=None) -> Neighbours:
    rows = np.array(rows, np.int64)
    if scores is None:
        scores = np.where(rows < 0, -np.inf, -np.arange(rows.shape[1], dtype=float))
    return Neighbours(rows=rows, scores=np.array(scores, np.float32))


def test_recall_is_the_share_of_true_neighbours():
    exact = lists([[1, 2, 3, 4], [5, 6, 7, 8]])
    found = lists([[1, 9, 3, 2], [9, 9, 9, 9]])
    assert recall_of_probes(found, exact, 1).tolist() == [1.0, 0.0]
    assert recall_of_probes(found, exact, 2).tolist() == [0.5, 0.0]
    assert recall_of_probes(found, exact, 4).tolist() == [0.75, 0.0]


def test_rows_of_one_probe_do_not_count_for_another():
    exact = lists([[1, 2], [3, 4]])
    assert recall_of_probes(lists([[3, 4], [1, 2]]), exact, 2).tolist() == [0.0, 0.0]


def test_a_tie_with_the_last_neighbour_counts():
    exact = lists([[1, 2, 3, 4]], [[3, 2, 2, 2]])
    assert recall_of_probes(lists([[1, 4]]), exact, 2).tolist() == [1.0]
    assert recall_of_probes(lists([[4, 3]]), exact, 2).tolist() == [1.0]
    assert recall_of_probes(lists([[9, 3]]), exact, 2).tolist() == [0.5]


def test_few_neighbours_are_measured_on_those_there_are():
    exact = lists([[1, 2, -1, -1], [-1, -1, -1, -1]])
    assert recall_of_probes(lists([[2, 1, -1], [-1, -1, -1]]), exact, 3).tolist() == [1.0, 1.0]
    assert recall_of_probes(lists([[2, -1, -1], [-1, -1, -1]]), exact, 3).tolist() == [0.5, 1.0]


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        recall = Recall.of((rng.random(200) < 0.9).astype(float))
        covered += recall.low <= 0.9 <= recall.high
    assert 0.88 <= covered / 200 <= 1


def curve_with(recalls: dict[int, float], num_probes: int = 400) -> tuple[list, Neighbours]:
    """Points whose recall@10 is the given share of probes, for odd and even ones alike."""
    rows = np.arange(num_probes * 10).reshape(num_probes, 10)
    exact = lists(rows)
    points = []
    for effort, recall in recalls.items():
        is_found = (np.arange(num_probes) // 2 % 100) < recall * 100
        found = lists(np.where(is_found[:, None], rows, -1))
        points.append(CurvePoint(effort=effort, found=found, seconds=effort))
    return points, exact


def test_the_cheapest_effort_that_surely_reaches_the_target_is_taken():
    points, exact = curve_with({1: 0.5, 2: 0.90, 4: 0.96, 8: 1.0})
    point, probes = choose_effort(points, exact, 0.9)
    assert point.effort == 4  # 2 reaches it in the mean only
    assert probes.sum() == 200


def test_without_certainty_the_mean_decides_and_else_the_largest_effort():
    points, exact = curve_with({1: 0.5, 2: 0.90})
    assert choose_effort(points, exact, 0.9)[0].effort == 2
    assert choose_effort(points, exact, 0.99)[0].effort == 2


def test_the_other_half_must_agree():
    points, exact = curve_with({2: 1.0, 4: 1.0})
    spoiled = points[0].found.rows.copy()
    spoiled[1::2] = -1  # only probes that do not choose
    points[0] = CurvePoint(effort=2, found=lists(spoiled), seconds=2)
    assert choose_effort(points, exact, 0.9)[0].effort == 4


def test_one_probe_or_none_is_enough():
    points, exact = curve_with({1: 1.0}, num_probes=1)
    point, probes = choose_effort(points, exact, 0.9)
    assert (point.effort, probes.tolist()) == (1, [True])
    assert Recall.of(np.empty(0)).mean == 1.0


def test_too_little_is_refused_with_numbers():
    check_recall(Recall(mean=0.95, low=0.9, high=1.0), 0.95, "the index")
    with pytest.raises(QualityGateError, match=r"is 0\.9000 .* below --target-recall=0\.95"):
        check_recall(Recall(mean=0.9, low=0.88, high=0.92), 0.95, "the index")
