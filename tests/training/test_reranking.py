"""Training a reranker in this process: it learns, and what it learned is what the rerank job reads."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from qbatch.models.rerank_tokens import CandidateGroup
from qbatch.models.reranker import RerankerConfig
from qbatch.pipelines.train_reranker import TrainRerankerConfig
from qbatch.training.loop import train
from tests.training_pairs import WORDS, note

SETTINGS = {
    "batch_size": (16,),
    "learning_rate": (3e-3,),
    "instruction": "find",
    "dtype": "float32",
    "checkpoint_every": 1000,
    "keep_checkpoints": 0,
}


def config_for(pairs: Path, output: Path, start: Path, **settings) -> TrainRerankerConfig:
    return TrainRerankerConfig(
        **{"pairs": (str(pairs),), "output": str(output), "init_config": str(start)}
        | SETTINGS
        | settings
    )


def train_here(config: TrainRerankerConfig) -> dict:
    train(replace(config.task("float32", 1), fingerprint="test"), config.settings())
    return json.loads(Path(config.output, "report.json").read_text())


def accuracy(model: Path) -> float:
    """How often the right note of new ones is ranked first."""
    rng = np.random.default_rng(9)
    groups = [
        CandidateGroup(
            query=f"find {w}",
            documents=[note(rng, x) for x in (w, *WORDS[:4]) if x == w or w not in WORDS[:4]],
        )
        for w in WORDS[4:]
    ]
    config = RerankerConfig(model_path=model, dtype="float32", device="cpu", instruction="find")
    keys = config.build().score(groups)
    return float(np.mean([k.argmax() == 0 for k in keys]))
