"""Gradients of a loss over more texts than fit in memory at once (Gao et al., arXiv 2101.06983).

A contrastive loss needs the vectors of the whole batch, but not the graphs behind them. So texts
are embedded in chunks without graph, the loss is taken on the vectors, and each chunk is embedded
again, with graph, to carry the gradient of its vectors to the parameters. The batch then costs
memory for its vectors only.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch
from torch.nn.parallel import DistributedDataParallel

from qbatch.training.losses import ContrastiveBatch, ContrastiveConfig, matryoshka_losses
from qbatch.training.world import World

ChunkT = TypeVar("ChunkT")

_LOSS_ROWS = 256
"""Rows whose losses are computed at once: of each, there is a score for every candidate."""


class GradientCache(Generic[ChunkT]):
    """Passes chunks through a network twice, the second time backward."""

    def __init__(self, network: torch.nn.Module) -> None:
        """Take a network that turns a chunk into outputs, a row each; it may be a DDP wrapper."""
        self._network = network

    def backward(
        self,
        chunks: Sequence[ChunkT],
        gradients_of: Callable[[torch.Tensor], torch.Tensor],
        *,
        num_passes: int = 0,
    ) -> None:
        """Add the gradient of a loss to the parameters.

        Args:
            chunks: What the network takes; at least one.
            gradients_of: From the outputs of all chunks to the gradient of the loss in them, both
                of shape (rows, ...).
            num_passes: Pass the last chunk again, without effect, until there were that many
                passes: processes that shard a network must pass equally often.
        """
        missing = max(0, num_passes - len(chunks))
        if len(chunks) == 1 and not missing:
            outputs = self._network(chunks[0])
            outputs.backward(gradients_of(outputs.detach()))
            return
        states, parts = [], []
        with torch.no_grad():
            for chunk in chunks:
                states.append(_random_states())
                parts.append(self._network(chunk))
            for _ in range(missing):
                self._network(chunks[-1])
        gradients = list(torch.split(gradients_of(torch.cat(parts)), [len(part) for part in parts]))
        gradients += [torch.zeros_like(gradients[-1])] * missing
        passes = [*range(len(chunks)), *[len(chunks) - 1] * missing]
        for number, (i, gradient) in enumerate(zip(passes, gradients, strict=True), 1):
            with without_exchange(self._network, until=number == len(passes)):
                _restore(states[i])
                self._network(chunks[i]).backward(gradient)


def without_exchange(network: torch.nn.Module, *, until: bool) -> AbstractContextManager[object]:
    """Return a context in which DDP keeps gradients to itself, unless ``until`` holds."""
    if until or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def contrastive_gradients(
    own: ContrastiveBatch, config: ContrastiveConfig, world: World
) -> tuple[float, torch.Tensor]:
    """Return the mean loss of the global batch and its gradient in this process's vectors.

    All processes exchange their vectors, each computes the losses of its own rows, and what these
    say about the others' vectors goes back to them. The gradient is that of the mean over the
    global batch, times the number of processes: data-parallel training averages the gradients of
    parameters over processes where this loss needs their sum.

    Args:
        own: The rows of this process; all processes have equally many.
        config: Of the loss.
        world: Who trains together.
    """
    everyone = ContrastiveBatch(
        vectors=world.gather(own.vectors.detach()).requires_grad_(),
        keys=world.gather(own.keys),
        present=world.gather(own.present),
    )
    num_rows = len(everyone.keys)
    rows = world.share(num_rows)
    total = everyone.vectors.new_zeros(())
    for start in range(rows.start, rows.stop, _LOSS_ROWS):
        part = slice(start, min(start + _LOSS_ROWS, rows.stop))
        loss = matryoshka_losses(everyone, part, config).sum() / num_rows
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        total += loss.detach()
    gradient = everyone.vectors.grad
    if gradient is None:
        raise ValueError(f"no rows for this process among {num_rows}; give each at least one")
    return float(world.sum(total)), world.sum(gradient)[rows] * world.size


_RandomStates = tuple[torch.Tensor, torch.Tensor | None]


def _random_states() -> _RandomStates:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _restore(states: _RandomStates) -> None:
    """Let dropout fall as it did in the first pass."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])
