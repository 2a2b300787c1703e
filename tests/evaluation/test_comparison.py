"""The randomisation test beside all sign assignments, and its edges."""

import itertools

import numpy as np
import pytest

from qbatch.evaluation import comparison as module
from qbatch.evaluation.comparison import compare


def exact_p_value(differences: np.ndarray) -> float:
    signs = np.array(list(itertools.product([-1, 1], repeat=len(differences))))
    means = np.abs((signs * differences).mean(axis=1))
    return float((means >= abs(differences.mean()) - 1e-12).mean())


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.2])
def test_p_value_is_that_of_all_signs(shift):
    random = np.random.default_rng(5)
    values = random.random(14)
    other = values - shift - random.normal(0, 0.15, 14)
    found = compare(values, other, seed=0)
    # five standard errors of 10,000 draws at p = 0.5
    assert found.p_value == pytest.approx(exact_p_value(values - other), abs=0.025)


def test_a_clear_difference_is_significant_and_signs_point_to_the_better_run():
    values = np.full(40, 0.5)
    found = compare(values, values - 0.1, seed=3)
    assert found.p_value == pytest.approx(1 / (module.DRAWS + 1))
    assert (found.wins, found.ties, found.losses) == (40, 0, 0)
    assert found.difference == pytest.approx(0.1)
    back = compare(values - 0.1, values, seed=3)
    assert (back.difference, back.losses) == (pytest.approx(-0.1), 40)
    assert back.p_value == found.p_value


def test_equal_runs():
    values = np.random.default_rng(0).random(10)
    found = compare(values, values + 1e-15, seed=0)
    assert (found.difference, found.p_value) == (0.0, 1.0)
    assert (found.wins, found.ties, found.losses) == (0, 10, 0)


def test_ties_change_no_p_value():
    random = np.random.default_rng(1)
    values, other = random.random(20), random.random(20)
    padded = compare(np.append(values, np.ones(30)), np.append(other, np.ones(30)), seed=7)
    assert padded.p_value == compare(values, other, seed=7).p_value
    assert padded.ties == 30


def test_the_seed_decides_and_blocks_do_not(monkeypatch):
    random = np.random.default_rng(2)
    values, other = random.random(30), random.random(30)
    found = compare(values, other, seed=1)
    assert compare(values, other, seed=1) == found
    assert compare(values, other, seed=2) != found
    monkeypatch.setattr(module, "_BLOCK_VALUES", 1000)
    assert compare(values, other, seed=1).p_value == found.p_value


def test_p_values_of_equal_runs_are_uniform():
    random = np.random.default_rng(4)
    p_values = [
        compare(random.random(30), random.random(30), seed=seed).p_value for seed in range(200)
    ]
    # 200 draws of a uniform value: the share below 0.5 has a standard error of 0.035
    assert 0.36 < np.mean(np.array(p_values) < 0.5) < 0.64
    assert np.mean(np.array(p_values) < 0.05) < 0.13
