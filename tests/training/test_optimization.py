"""The learning rate of each step, and what decays."""

import math

import pytest
import torch

from qbatch.training.optimization import clip_gradients, learning_rate_factor, make_optimizer
from qbatch.training.task import Optimization


def settings(schedule: str = "linear", warmup: float = 0.2) -> Optimization:
    return Optimization(
        schedule=schedule, warmup_fraction=warmup, weight_decay=0.1, max_grad_norm=1.0
    )


def test_the_rate_rises_and_falls_linearly():
    factors = [learning_rate_factor(step, 10, settings()) for step in range(10)]
    assert factors == pytest.approx([0.5, 1.0, *(1 - i / 8 for i in range(8))])


def test_the_cosine_starts_at_one_and_passes_a_half_in_the_middle():
    factors = [learning_rate_factor(step, 12, settings("cosine", 0.0)) for step in range(12)]
    assert factors[0] == 1
    assert factors[6] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx((1 + math.cos(math.pi * 11 / 12)) / 2)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_step_learns(schedule):
    for num_steps in (1, 2, 7):
        factors = [
            learning_rate_factor(step, num_steps, settings(schedule, 0.05))
            for step in range(num_steps)
        ]
        assert all(0 < factor <= 1 for factor in factors)


def test_matrices_decay_and_vectors_do_not():
    network = torch.nn.Linear(3, 2)
    network.bias.data.fill_(1.0)
    optimizer = make_optimizer(network, settings())
    decays = {group["params"][0].ndim: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {2: 0.1, 1: 0.0}


def test_frozen_parameters_have_no_optimizer_state():
    network = torch.nn.Linear(3, 2)
    network.weight.requires_grad_(False)
    [group] = make_optimizer(network, settings()).param_groups
    assert [p.ndim for p in group["params"]] == [1]


def test_long_gradients_are_scaled_down_to_the_limit():
    network = torch.nn.Linear(2, 1, bias=False)
    network.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(network, 1.0) == pytest.approx(5.0)
    assert network.weight.grad.norm().item() == pytest.approx(1.0)
