"""Real models and texts for tests, or a skip that says which one is missing.

Tests use no network: `make assets` puts these files into the cache before them.
"""

from pathlib import Path

import pytest

from qbatch.quickstart import assets


def minilm() -> Path:
    """Return the model folder of all-MiniLM-L6-v2."""
    return _require("minilm")


def qwen3_tokenizer() -> Path:
    """Return a folder with the tokenizer of Qwen3."""
    return _require("qwen3-tokenizer")


def smollm2() -> Path:
    """Return the model folder of SmolLM2-135M-Instruct."""
    return _require("smollm2")


def debian_descriptions() -> Path:
    """Return the JSONL file of Debian package descriptions."""
    return _require("debian-descriptions")


def _require(name: str) -> Path:
    path = assets.cached(name)
    if path is None:
        pytest.skip(f"needs `python -m qbatch.quickstart.assets {name}`")
    return path
