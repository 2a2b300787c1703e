"""Do two ways to compute a model give vectors that may share an index?

A server instead of the actors, or another dtype: the same texts go through both, token by token the
same, and the vectors are compared, each with its twin and in whom they find.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from qbatch.corpus.config import Format
from qbatch.corpus.listing import resolve_config
from qbatch.corpus.units import plan_units
from qbatch.errors import BadInputError, ConfigError, QualityGateError
from qbatch.models.devices import resolve_device, resolve_dtype
from qbatch.models.hub import resolve_model
from qbatch.models.loading import load_spec
from qbatch.models.server import ServerConfig
from qbatch.pipelines.embed import EmbedCorpusConfig, make_task
from qbatch.pipelines.embed_estimate import read_sample
from qbatch.pipelines.embed_forward import build_embedder, embed_passages
from qbatch.pipelines.embed_task import EmbedTask
from qbatch.schema import ComputeDtype

_NEIGHBOURS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityConfig:
    """Compare two engines of one model on a sample of texts."""

    input: str
    """Directory, object or glob of texts, in any corpus format."""
    model: str
    """Model directory or hub id."""
    revision: str | None = None
    """Commit of a hub id."""
    format: Format = "auto"
    """How to read the input."""
    text_column: str = "text"
    """Column of the text."""
    dtype: Literal["auto"] | ComputeDtype = "auto"
    """In which the first engine computes: the model in this process."""
    endpoint: str | None = None
    """The second engine: an OpenAI-compatible server, such as http://host:8000/v1."""
    served_model: str | None = None
    """What the server calls the model; None is --model as given."""
    other_dtype: ComputeDtype | None = None
    """The second engine, without --endpoint: the model in this process, in another dtype."""
    other_weights: Literal["int8"] | None = None
    """The second engine, without --endpoint: the model in this process, with int8 weights."""
    num_texts: int = 256
    """How many passages are compared."""
    min_cosine: float = 0.999
    """Of each text's two vectors; bfloat16 stays well above it."""
    min_overlap: float = 0.95
    """Mean share of the ten nearest texts that both find."""

    def __post_init__(self) -> None:
        names = ("endpoint", "other_dtype", "other_weights")
        others = {name: getattr(self, name) for name in names}
        if sum(value is not None for value in others.values()) != 1:
            raise ConfigError(f"given are {others}; give one of them, the engine to compare with")
        if self.num_texts <= _NEIGHBOURS:
            raise ConfigError(f"num_texts is {self.num_texts}; give more than {_NEIGHBOURS}")

    def server(self) -> ServerConfig | None:
        """Return the server, None for another dtype or int8 weights."""
        if self.endpoint is None:
            return None
        return ServerConfig(endpoint=self.endpoint, model=self.served_model or self.model)


def parity(config: ParityConfig) -> dict[str, Any]:
    """Compare two engines and return the figures.

    Raises:
        QualityGateError: Their vectors must not share an index.
        QbatchError: Each subclass ends the command with its own exit code; see qbatch.errors.
    """
    spec = load_spec(resolve_model(config.model, config.revision))
    shared = ("input", "model", "revision", "format", "text_column")
    embedding = EmbedCorpusConfig(output="", **{name: getattr(config, name) for name in shared})
    task = make_task(embedding, spec, resolve_dtype(config.dtype, resolve_device()))
    task = replace(task, corpus=resolve_config(task.corpus))
    passages = read_sample(plan_units(task.corpus), task)[0].slice(0, config.num_texts)
    if len(passages) <= _NEIGHBOURS:
        raise BadInputError(
            f"{len(passages)} passages in the sample of {config.input}; give more than "
            f"{_NEIGHBOURS} texts to compare"
        )
    other = _other_task(task, config)
    first, second = (embed_passages(build_embedder(t), passages) for t in (task, other))
    found = compare(first, second)
    if found["cosine_min"] < config.min_cosine or found["overlap"] < config.min_overlap:
        raise QualityGateError(
            f"these vectors must not share an index: {_told(found)}; needed are "
            f"{config.min_cosine:g} and {config.min_overlap:g}. Check that model, revision, dtype "
            "and pooling of both are the same"
        )
    return {"texts": len(passages), "may_share_an_index": True, **found}


def _other_task(task: EmbedTask, config: ParityConfig) -> EmbedTask:
    if config.other_weights is not None:
        return replace(task, dtype="float32", weights=config.other_weights)
    return replace(task, server=config.server(), dtype=config.other_dtype or task.dtype)


def compare(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Return how close the vectors of two engines are.

    Args:
        first: float32, (texts, dim), more than ten texts.
        second: The same texts by the other engine; a text without a number counts as cosine -1.
    """
    a, b = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (first, second))
    cosines = np.nan_to_num(np.sum(a * b, axis=1), nan=-1.0)
    shared = [
        len(set(x) & set(y)) / _NEIGHBOURS for x, y in zip(_nearest(a), _nearest(b), strict=True)
    ]
    return {
        "cosine_min": round(float(cosines.min()), 6),
        "cosine_mean": round(float(cosines.mean()), 6),
        "overlap": round(float(np.mean(shared)), 4),
    }


def _nearest(vectors: np.ndarray) -> list[list[int]]:
    scores = np.nan_to_num(vectors @ vectors.T, nan=-2.0)
    np.fill_diagonal(scores, -3.0)
    order: list[list[int]] = np.argsort(-scores, axis=1, kind="stable")[:, :_NEIGHBOURS].tolist()
    return order


def _told(found: Mapping[str, float]) -> str:
    return f"the smallest cosine is {found['cosine_min']}, the overlap {found['overlap']}"
