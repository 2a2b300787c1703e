"""Pairs tables and their texts for tests of the training system's data side."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qbatch.models.embedder import EmbedderConfig
from qbatch.models.tokenization import TextTokenizer
from qbatch.storage import Storage


def random_words(rng: np.random.Generator, num_words: int) -> str:
    words = ("".join(rng.choice(list("abcdefghij"), rng.integers(2, 7))) for _ in range(num_words))
    return " ".join(words)


def write_json_lines(uri: str, name: str, rows: Sequence[dict]) -> None:
    Storage(uri).write(name, "".join(json.dumps(row) + "\n" for row in rows).encode())


def embed_one_by_one(model: str, texts: Sequence[str]) -> np.ndarray:
    """Return float32 vectors, each text computed alone."""
    embedder = EmbedderConfig(model_path=Path(model), dtype="float32").build()
    tokenizer = TextTokenizer.load(Path(model))
    found = []
    for text in texts:
        tokens = tokenizer.encode([text])
        found.append(embedder.embed(tokens.ids, tokens.lengths)[0])
    return np.array(found)
