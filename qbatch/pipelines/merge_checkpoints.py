"""The merge job: checkpoints of one model become one model, tensor by tensor."""

import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbatch.cli import FloatList, StrList
from qbatch.errors import ConfigError
from qbatch.models.hub import resolve_model
from qbatch.models.loading import hash_tokenizer, read_json, weight_files, weights_sha256
from qbatch.report.writing import write_report
from qbatch.storage import Storage, probe
from qbatch.training.merging import MergeMethod, MergeSettings, merge_weights
from qbatch.training.publishing import COMPLETE, publish_directory, read_complete, workspace

log = logging.getLogger(__name__)

_UNRELATED = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}
"""Keys of config.json that may differ between checkpoints of one model."""

_SAME_JSON = ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeCheckpointsConfig:
    """Merge checkpoints of one model on the sphere."""

    checkpoints: StrList
    """Two or more model directories, in the order in which slerp takes them."""
    output: str
    """Directory of the merged model."""
    method: MergeMethod = "slerp"
    """slerp interpolates one checkpoint after the other; spherical-mean takes all at once."""
    weights: FloatList = ()
    """Share of each checkpoint, in any unit; empty means equal shares."""
    base: str | None = None
    """Model that all were trained from; then the differences from it are merged."""
    single_writer: bool = False
    """I am the only writer here: allow a store without conditional PUT."""
    dry_run: bool = False
    """Check the checkpoints and print what would be merged; write nothing."""

    def __post_init__(self) -> None:
        if len(self.checkpoints) < 2:
            raise ConfigError(f"checkpoints are {self.checkpoints}; give two or more")
        if self.weights and len(self.weights) != len(self.checkpoints):
            raise ConfigError(
                f"{len(self.weights)} weights for {len(self.checkpoints)} checkpoints; give one "
                "each, or none"
            )
        if any(not math.isfinite(w) or w < 0 for w in self.weights) or (
            self.weights and self.weights[0] == 0
        ):
            raise ConfigError(
                f"weights are {self.weights}; give numbers of 0 or more, the first above 0"
            )

    def settings(self) -> MergeSettings:
        """Return method and shares that add up to 1."""
        weights = self.weights or (1.0,) * len(self.checkpoints)
        total = sum(weights)
        return MergeSettings(method=self.method, weights=tuple(w / total for w in weights))


def merge_checkpoints(config: MergeCheckpointsConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        QbatchError: Each subclass ends the job with its own exit code; see qbatch.errors.
    """
    started = time.perf_counter()
    folders = [resolve_model(checkpoint) for checkpoint in config.checkpoints]
    base = None if config.base is None else resolve_model(config.base)
    _check_same_model(folders)
    settings = config.settings()
    recipe = {
        "kind": "merged-model",
        "method": settings.method,
        "weights": list(settings.weights),
        "checkpoints_sha256": [weights_sha256(folder) for folder in folders],
        "base_sha256": None if base is None else weights_sha256(base),
    }
    summary: dict[str, Any] = {"output": config.output, **recipe}
    if config.dry_run:
        size = sum(file.stat().st_size for file in weight_files(folders[0]))
        return {**summary, "weight_bytes": size}
    storage = Storage(config.output, single_writer=config.single_writer)
    if _is_made(storage, recipe):
        log.info("nothing to do: %s is that merge", storage.uri)
        return {**summary, "tensors": 0}
    probe(storage)
    with workspace(storage) as folder:
        _copy_files(folders[0], folder)
        num_tensors = merge_weights(folders, folder, settings, base)
        publish_directory(folder, storage, "", recipe)
    summary |= {"tensors": num_tensors, "seconds": round(time.perf_counter() - started, 3)}
    write_report(storage, "merged-model", summary)
    return summary


def _is_made(storage: Storage, recipe: dict[str, Any]) -> bool:
    found = read_complete(storage)
    if found is None:
        return False
    if any(found.get(key) != value for key, value in recipe.items()):
        raise ConfigError(
            f"{storage.uri} holds another model: {COMPLETE} there does not name these checkpoints, "
            "weights and method. Choose another --output"
        )
    return True


def _check_same_model(folders: Sequence[Path]) -> None:
    """Refuse checkpoints that differ in anything but weights."""
    first = folders[0]
    for other in folders[1:]:
        if hash_tokenizer(first) != hash_tokenizer(other):
            raise ConfigError(
                f"{first} and {other} have different tokenizers; rows of their embedding tables "
                "would stand for different tokens. Merge checkpoints of one training run"
            )
        for name in ("config.json", *_SAME_JSON):
            _check_same_json(first / name, other / name)


def _check_same_json(first: Path, other: Path) -> None:
    ours, theirs = (read_json(file, default={}) for file in (first, other))
    if ours == theirs:
        return
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = {k for k in ours.keys() | theirs if ours.get(k) != theirs.get(k)} - _UNRELATED
        if not keys:
            return
        key = min(keys)
        difference = f"{key}: {ours.get(key)!r} and {theirs.get(key)!r}"
    else:
        difference = f"{ours!r} and {theirs!r}"
    raise ConfigError(
        f"{first} and {other} differ: {difference}. Merge checkpoints of one training run"
    )


def _copy_files(source: Path, target: Path) -> None:
    """Copy what a model directory holds besides weights; parts of a training run stay behind."""
    for folder in (source, source / "1_Pooling", source / "2_Normalize"):
        for file in sorted(folder.glob("*")):
            is_model_file = file.is_file() and file.suffix in {".json", ".txt", ".model"}
            if is_model_file and file.name not in {COMPLETE, "report.json"}:
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
