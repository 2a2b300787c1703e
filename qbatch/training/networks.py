"""The modules that are trained, and what is done to them first: adapters, checkpointing, sharding.

They compute what the embedder and the reranker of our jobs compute, by the same packed path.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from qbatch.errors import ConfigError
from qbatch.models.backbone import Backbone
from qbatch.models.loading import Pooling
from qbatch.models.rerank_packing import PairPack
from qbatch.training.task import Compute, Lora, Sharding
from qbatch.training.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPack:
    """Texts that go through the model together, one after the other."""

    ids: torch.Tensor
    """int64, shape (tokens,), on the device; as are the positions."""
    positions: torch.Tensor
    lengths: np.ndarray
    """Tokens of each text."""


class TextEncoder(torch.nn.Module):
    """Packs of texts to hidden states, one a text, not normalised."""

    def __init__(self, model: PreTrainedModel, pooling: Pooling, compute: Compute) -> None:
        """Take over a loaded model in evaluation mode; it is left in training mode."""
        super().__init__()
        self.model = model
        self._backbone = Backbone(model, pooling)
        self._compute = compute
        prepare_for_training(model, compute)

    def forward(self, pack: TextPack) -> torch.Tensor:
        """Return float32 of shape (texts, hidden_dim)."""
        with autocast(pack.ids.device, self._compute):
            return self._backbone.pool(pack.ids, pack.positions, pack.lengths)


class AnswerModel(torch.nn.Module):
    """Packs of pairs to what a causal model thinks of the answers no and yes."""

    def __init__(
        self, model: PreTrainedModel, answers: tuple[int, int], compute: Compute, *, two_way: bool
    ) -> None:
        """Take over a loaded causal model in evaluation mode; it is left in training mode.

        Args:
            model: With its head.
            answers: Token ids of no and yes.
            compute: How to compute.
            two_way: Give logits of the two answers, and spare the rest of the head; else
                log-likelihoods among all tokens.
        """
        super().__init__()
        self.model = model
        self._backbone = Backbone(cast("PreTrainedModel", model.base_model), "last")
        self.shares_prefixes = self._backbone.shares_prefixes
        self._answers = list(answers)
        self._two_way = two_way
        self._compute = compute
        prepare_for_training(model, compute)

    def forward(self, pack: PairPack) -> torch.Tensor:
        """Return float32 of shape (pairs, 2)."""
        device = self._backbone.device
        ids, positions = (torch.from_numpy(x).to(device) for x in (pack.ids, pack.positions))
        with autocast(device, self._compute):
            pooled = self._backbone.pool(ids, positions, pack.lengths, parents=pack.parents)
            states = pooled[torch.from_numpy(pack.pairs).to(device)]
            head = cast("torch.nn.Linear", self.model.get_output_embeddings())  # type: ignore[no-untyped-call]  # transformers'
            if not self._two_way:
                likelihoods: torch.Tensor = head(states).float().log_softmax(-1)
                return likelihoods[:, self._answers]
        return states @ head.weight[self._answers].float().T


def autocast(device: torch.device, compute: Compute) -> torch.autocast:
    """Return the context in which matrix products run in the compute dtype."""
    dtype = getattr(torch, compute.dtype)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def prepare_for_training(model: PreTrainedModel, compute: Compute) -> None:
    """Switch on training mode; freeze what no loss reaches, such as an encoder's pooler."""
    for name, parameter in model.named_parameters():
        if name.startswith("pooler."):
            parameter.requires_grad_(False)
    if compute.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]  # transformers'
    model.train()


def add_adapters(model: PreTrainedModel, lora: Lora) -> None:
    """Put adapters beside all linear layers but the head; only they are trained.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(
            "--lora-rank needs the package peft; pip install 'qbatch[training]'"
        ) from error
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
    )
    inject_adapter_in_model(config, model)


def without_adapters(
    state: Mapping[str, torch.Tensor], lora: Lora | None
) -> dict[str, torch.Tensor]:
    """Return the weights with adapters multiplied out and added, under their old names."""
    if lora is None:
        return dict(state)
    merged = {}
    for name, tensor in state.items():
        stem, is_base, suffix = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        if is_base and suffix == "weight":
            down, up = (state[f"{stem}.lora_{side}.default.weight"] for side in "AB")
            delta = lora.scale * (up.float() @ down.float())
            merged[f"{stem}.weight"] = (tensor.float() + delta).to(tensor.dtype)
        else:
            merged[f"{stem}.{suffix}" if is_base else name] = tensor
    return merged


def wrap(network: torch.nn.Module, sharding: Sharding, world: World) -> torch.nn.Module:
    """Return the network as several processes train it: replicated, or sharded layer by layer."""
    if world.size == 1:
        return network
    if sharding == "ddp":
        return DistributedDataParallel(network, forward_sync_buffers=False)
    device = next(network.parameters()).device
    mesh = init_device_mesh(device.type, (world.size,))
    layers = {
        name
        for module in network.modules()
        if isinstance(module, PreTrainedModel)
        for name in module._no_split_modules or ()
    }
    for module in network.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network
