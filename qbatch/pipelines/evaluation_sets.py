"""Which evaluation sets are meant: folders, and MTEB's retrieval tasks by name."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from qbatch.errors import ConfigError
from qbatch.models.hub import HUB_ERRORS

_MTEB = "mteb:"
_BEIR_FILES = ["corpus.jsonl*", "queries.jsonl*", "qrels/*"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSet:
    """A folder in the layout of BEIR, and what it is called."""

    name: str
    uri: str
    revision: str | None = None
    """Commit of what was downloaded; None for a folder of the user's own."""


def resolve_set(given: str) -> EvaluationSet:
    """Return the set that ``--datasets`` names, downloading one of MTEB's once.

    MTEB keeps its retrieval tasks on the Hugging Face hub as ``mteb/NAME``, in the layout of BEIR.

    Args:
        given: The URI of a folder, or ``mteb:NAME``, with ``@COMMIT`` to pin it: ``mteb:scifact``.

    Raises:
        ConfigError: The hub did not deliver it, or it has another layout.
    """
    if not given.startswith(_MTEB):
        return EvaluationSet(name=given.rstrip("/").rpartition("/")[2], uri=given)
    name, _, commit = given.removeprefix(_MTEB).partition("@")
    try:
        found = snapshot_download(
            f"mteb/{name}",
            repo_type="dataset",
            revision=commit or None,
            allow_patterns=_BEIR_FILES,
        )
    except HUB_ERRORS as error:
        raise ConfigError(
            f"the hub did not deliver {given!r} of --datasets: {error}. Check the name (that of "
            "https://huggingface.co/mteb, such as mteb:scifact) and HF_TOKEN, or give a folder"
        ) from error
    if not any(Path(found).glob("qrels/*")):
        raise ConfigError(
            f"{given!r} of --datasets has no qrels/ on the hub, so it is no retrieval task in the "
            "layout of BEIR; give another, or a folder"
        )
    return EvaluationSet(name=name, uri=found, revision=Path(found).name)
