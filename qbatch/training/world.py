"""The processes that train together, and what they exchange besides the model's gradients."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of the default process group; alone without one."""

    rank: int
    size: int

    @classmethod
    def current(cls) -> "World":
        """Return the place of this process."""
        if not dist.is_initialized():
            return cls(0, 1)
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, num_rows: int) -> slice:
        """Return which of the rows of a global batch are this process's; all have as many."""
        own = num_rows // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all processes, joined along the first axis in order of rank.

        They have one shape. No gradient passes; see ``gradient_cache``.
        """
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the elementwise sum over processes."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, value: int, device: torch.device) -> int:
        """Return the largest of the processes' values; ``device`` is where they exchange it."""
        found = self._reduce(torch.tensor(value, device=device), dist.ReduceOp.MAX)
        return int(found.item())

    def _reduce(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if self.size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor, operation)
        return tensor
