"""Points from which a killed training goes on, and the checkpoints that stay for merging.

    checkpoints/step-00000500/   a model directory; the newest few stay
    resume/step-00000500/        trained weights and optimizer state; only the newest stays

Both count once their ``complete.json`` is there. No pickles: all state is safetensors and JSON.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from qbatch.errors import ConfigError
from qbatch.storage import Storage
from qbatch.training.publishing import (
    COMPLETE,
    delete_directory,
    publish_directory,
    read_complete,
    workspace,
)

_STATE, _HISTORY = "state.safetensors", "history.json"
_COMPLETE_STEP = re.compile(r"(?:.*/)?step-(\d{8})/" + re.escape(COMPLETE))


@dataclass(kw_only=True, slots=True)
class History:
    """What each step so far was like."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """Steps done."""
        return len(self.losses)


def step_directory(kind: str, step: int) -> str:
    """Return the path of a checkpoint or resume point inside the output."""
    return f"{kind}/step-{step:08d}"


def complete_steps(storage: Storage, kind: str, fingerprint: str) -> list[int]:
    """Return the steps of whole checkpoints or resume points of this run, in rising order."""
    steps = [
        int(m[1]) for o in storage.iter_objects(kind) if (m := _COMPLETE_STEP.fullmatch(o.path))
    ]
    return sorted(
        step
        for step in steps
        if (read_complete(storage, step_directory(kind, step)) or {}).get("fingerprint")
        == fingerprint
    )


def model_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights on the CPU of the first process, {} on others; all must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(network, options=options)
    return state


def training_state(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Return trained weights and optimizer state, flat, as ``model_state`` does.

    Both start with what they are: ``weights/NAME`` and ``optimizer/NAME/KEY``.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights: dict[str, Any] = get_model_state_dict(network, options=options)
    moments: dict[str, Any] = get_optimizer_state_dict(network, optimizer, options=options)
    flat = {f"weights/{name}": x for name, x in weights.items()}
    for name, entries in moments.get("state", {}).items():
        flat |= {f"optimizer/{name}/{key}": x for key, x in entries.items()}
    return {name: x.clone().contiguous() for name, x in flat.items()}  # tied weights share memory


def restore_weights(network: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put back the weights that ``training_state`` gave; every process has the whole state."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    weights: dict[str, Any] = _below(state, "weights")
    set_model_state_dict(network, weights, options=options)


def restore_optimizer(
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, torch.Tensor],
) -> None:
    """Put back the optimizer state that ``training_state`` gave, likewise."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    moments: dict[str, Any] = {}
    for path, tensor in _below(state, "optimizer").items():
        name, _, key = path.rpartition("/")
        moments.setdefault(name, {})[key] = tensor
    groups = get_optimizer_state_dict(network, optimizer)["param_groups"]
    whole: dict[str, Any] = {"state": moments, "param_groups": groups}
    set_optimizer_state_dict(network, optimizer, whole, options=options)


def _below(state: Mapping[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    start = f"{kind}/"
    return {k.removeprefix(start): x for k, x in state.items() if k.startswith(start)}


def refuse_other_runs(storage: Storage, fingerprint: str) -> None:
    """Raise ConfigError if there are checkpoints of a training with other settings or data."""
    found = [("", read_complete(storage))]
    for kind in ("checkpoints", "resume"):
        for info in storage.iter_objects(kind):
            if _COMPLETE_STEP.fullmatch(info.path):
                directory = info.path.removesuffix(f"/{COMPLETE}")
                found.append((directory, read_complete(storage, directory)))
    for directory, facts in found:
        if facts is not None and facts.get("fingerprint") != fingerprint:
            raise ConfigError(
                f"{storage.object_uri(directory)} belongs to a training with other settings, data "
                f"or start ({facts.get('fingerprint')}, this one is {fingerprint}). Choose another "
                "--output, or delete that one"
            )


def write_resume_point(
    storage: Storage, state: dict[str, torch.Tensor], history: History, fingerprint: str
) -> None:
    """Write where training stands, then drop older points; one process does."""
    directory = step_directory("resume", history.num_steps)
    with workspace(storage) as folder:
        save_file(state, folder / _STATE)
        content = {"losses": history.losses, "grad_norms": history.grad_norms}
        (folder / _HISTORY).write_text(json.dumps(content))
        publish_directory(folder, storage, directory, {"fingerprint": fingerprint})
    for step in complete_steps(storage, "resume", fingerprint)[:-1]:
        delete_directory(storage, step_directory("resume", step))


def read_resume_point(storage: Storage, step: int) -> tuple[dict[str, torch.Tensor], History]:
    """Return the state and history of a resume point."""
    directory = step_directory("resume", step)
    history: dict[str, Any] = json.loads(storage.read(f"{directory}/{_HISTORY}"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, _STATE)
        storage.download(f"{directory}/{_STATE}", file)
        return load_file(file), History(**history)
