"""The actors of the jobs with real models, but for a character whose token kills the process."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qbatch.pipelines.embed_forward import EmbedActor
from qbatch.pipelines.embed_task import EmbedTask
from qbatch.pipelines.rerank_forward import RerankActor
from qbatch.pipelines.rerank_task import RerankTask

DEADLY = "~"


def deadly_id(model: str) -> int:
    return json.loads(Path(model, "tokenizer.json").read_text())["model"]["vocab"][DEADLY]


def mortal(compute: Callable, token_ids: Callable, deadly: int) -> Callable:
    """Return ``compute``, which ends the process when one of its tokens is the deadly one."""

    def compute_or_die(*args: object) -> object:
        if (token_ids(*args) == deadly).any():
            os._exit(1)
        return compute(*args)

    return compute_or_die


class DeadlyEmbedActor(EmbedActor):
    def __init__(self, task: EmbedTask, num_threads: int) -> None:
        super().__init__(task, num_threads)
        own = self._embedder
        own.embed = mortal(own.embed, lambda ids, *_: ids, deadly_id(task.model))


class DeadlyRerankActor(RerankActor):
    def __init__(self, task: RerankTask, num_threads: int) -> None:
        super().__init__(task, num_threads)
        for stage, own in zip(task.stages, self._rerankers, strict=True):
            own.score_tokens = mortal(
                own.score_tokens,
                lambda groups, *_: np.concatenate([g.ids for g in groups]),
                deadly_id(stage.model),
            )
