"""Where a model lies: a directory as it is, or a pinned hub model downloaded once."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from qbatch.errors import ConfigError

PINNED_REVISIONS = {
    "Qwen/Qwen3-Embedding-0.6B": "b22da495047858cce924d27d76261e96be6febc0",
    "Qwen/Qwen3-Embedding-4B": "636cd9bf47d976946cdbb2b0c3ca0cb2f8eea5ff",
    "Qwen/Qwen3-Embedding-8B": "4e423935c619ae4df87b646a3ce949610c66241c",
    "Qwen/Qwen3-Reranker-0.6B": "6e9e69830b95c52b5fd889b7690dda3329508de3",
    "Qwen/Qwen3-Reranker-4B": "f16fc5d5d2b9b1d0db8280929242745d79794ef5",
    "Qwen/Qwen3-Reranker-8B": "5fa94080caafeaa45a15d11f969d7978e087a3db",
}
"""The revisions mteb measured; used when the user names none."""

HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError)
"""What a download raises when the hub does not deliver."""

_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model"]


def resolve_model(model: str, revision: str | None = None) -> Path:
    """Return the local directory of a model, downloading a hub model once.

    Args:
        model: A directory, or a hub id such as ``Qwen/Qwen3-Embedding-0.6B``.
        revision: Commit of a hub id; None means the pinned one of a known model.

    Raises:
        ConfigError: Neither a directory nor a hub model that can be had, or an unpinned hub id.
    """
    if Path(model).is_dir():
        return Path(model)
    revision = revision or PINNED_REVISIONS.get(model)
    if revision is None:
        raise ConfigError(
            f"No model directory and no pinned hub model: {model!r}. Allowed: a local directory, "
            f"one of {sorted(PINNED_REVISIONS)}, or any other hub id with its commit as revision."
        )
    return _download(model, revision)


def _download(model: str, revision: str) -> Path:
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS))
    except HUB_ERRORS as e:
        raise ConfigError(
            f"The model hub did not deliver {model!r} at revision {revision!r}: {e}. Check the "
            "name, the revision and HF_TOKEN, or give a local directory."
        ) from e
