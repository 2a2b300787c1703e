"""Cached gradients against plain ones, in one process and across two."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from qbatch.training.gradient_cache import GradientCache, contrastive_gradients
from qbatch.training.losses import ContrastiveBatch, ContrastiveConfig, matryoshka_losses
from qbatch.training.world import World
from tests.processes import ROOT, free_port

NUM_ROWS, NUM_NEGATIVES, DIM = 8, 2, 6
CONFIG = ContrastiveConfig(temperature=0.2, dims=(6, 3))


def make_network(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(5, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, DIM)
    return nn.Sequential(*layers).double()


def make_inputs() -> torch.Tensor:
    """Shape (NUM_ROWS * (2 + NUM_NEGATIVES), 5)."""
    generator = torch.Generator().manual_seed(1)
    shape = (NUM_ROWS * (2 + NUM_NEGATIVES), 5)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def batch_of(outputs: torch.Tensor, rows: slice = slice(None)) -> ContrastiveBatch:
    """The batch whose vectors are ``outputs``; keys and presence are those of ``rows``."""
    generator = torch.Generator().manual_seed(2)
    keys = torch.randint(0, 40, (NUM_ROWS, 1 + NUM_NEGATIVES, 2), generator=generator)
    present = torch.rand(NUM_ROWS, NUM_NEGATIVES, generator=generator) < 0.7
    vectors = outputs.view(-1, 2 + NUM_NEGATIVES, DIM)
    return ContrastiveBatch(vectors=vectors, keys=keys[rows], present=present[rows])


def plain_gradients(network: nn.Module) -> tuple[float, list[torch.Tensor]]:
    loss = matryoshka_losses(batch_of(network(make_inputs())), slice(None), CONFIG).mean()
    return loss.item(), list(torch.autograd.grad(loss, list(network.parameters())))


def cached_gradients(
    network: nn.Module, world: World, *, chunk: int, num_passes: int = 0
) -> tuple[float, list[torch.Tensor]]:
    rows = world.share(NUM_ROWS)
    own = make_inputs().view(NUM_ROWS, -1, 5)[rows].reshape(-1, 5)
    losses = []

    def gradients_of(outputs: torch.Tensor) -> torch.Tensor:
        loss, gradient = contrastive_gradients(batch_of(outputs, rows), CONFIG, world)
        losses.append(loss)
        return gradient.reshape(outputs.shape)

    GradientCache(network).backward(own.split(chunk), gradients_of, num_passes=num_passes)
    return losses[0], [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize("chunk", [1, 5, 32])
@pytest.mark.parametrize("num_passes", [0, 40])
def test_cached_gradients_are_the_plain_ones(chunk, num_passes):
    loss, gradients = cached_gradients(
        make_network(), World.current(), chunk=chunk, num_passes=num_passes
    )
    expected_loss, expected = plain_gradients(make_network())
    assert loss == pytest.approx(expected_loss, abs=1e-12)
    for gradient, plain in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-9, atol=1e-12)


def test_both_passes_drop_out_the_same_units():
    """Re-embedded outputs equal the cached ones only if the random state was kept."""
    network, seen = make_network(dropout=0.5), []
    network.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    torch.manual_seed(3)
    GradientCache(network).backward(make_inputs().split(8), torch.ones_like)
    first, second = seen[:4], seen[4:]
    for cached, again in zip(first, second, strict=True):
        torch.testing.assert_close(cached, again)
    assert not torch.equal(first[0], make_network(dropout=0.5).eval()(make_inputs()[:8]))


def test_no_graph_outlives_its_chunk():
    network, graphs, most = make_network(), [], []

    def watch(module, args, output):
        if output.requires_grad:
            graphs.append(weakref.ref(output))
            most.append(sum(graph() is not None for graph in graphs))

    network.register_forward_hook(watch)
    GradientCache(network).backward(make_inputs().split(4), torch.ones_like)
    assert most == [1] * 8


def worker(rank: int, port: int) -> None:
    """One of two processes: prints the loss and the averaged gradients."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    network = nn.parallel.DistributedDataParallel(make_network())
    loss, gradients = cached_gradients(network, World.current(), chunk=5)
    print(json.dumps([loss, [gradient.tolist() for gradient in gradients]]))
    torch.distributed.destroy_process_group()


def test_two_processes_get_the_gradients_of_one():
    port = free_port()
    code = "import sys; from tests.training import test_gradient_cache as test; "
    code += "test.worker(*map(int, sys.argv[1:]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(port)],
            cwd=Path(ROOT),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    expected_loss, expected = plain_gradients(make_network())
    for output in outputs:
        loss, gradients = json.loads(output.splitlines()[-1])
        assert loss == pytest.approx(expected_loss, abs=1e-12)
        for gradient, plain in zip(gradients, expected, strict=True):
            found = torch.tensor(gradient, dtype=torch.float64)
            torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12)
