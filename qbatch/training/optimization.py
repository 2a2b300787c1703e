"""AdamW, and the learning rate of each step."""

import math

import torch

from qbatch.training.task import Optimization


def make_optimizer(network: torch.nn.Module, settings: Optimization) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters; norms and biases do not decay."""
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0)


def learning_rate_factor(step: int, num_steps: int, settings: Optimization) -> float:
    """Return what the learning rate of a step is multiplied with, above 0 to 1.

    It rises linearly over the first ``warmup_fraction`` of the steps and falls towards 0 after.

    Args:
        step: From 0, within a stage.
        num_steps: Of the stage.
        settings: Schedule and warm-up.
    """
    num_warmup = math.ceil(settings.warmup_fraction * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    if settings.schedule == "linear":
        return 1 - progress
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0


def clip_gradients(network: torch.nn.Module, max_norm: float) -> float:
    """Scale gradients down to a norm of at most ``max_norm``; return the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    if isinstance(norm, torch.distributed.tensor.DTensor):
        norm = norm.full_tensor()
    return float(norm)
