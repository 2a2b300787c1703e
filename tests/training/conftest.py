"""Tiny starts and toy data for training."""

from pathlib import Path

import pytest
import torch

from tests.models.conftest import make_qwen3  # noqa: F401 - a fixture
from tests.tiny_models import write_tiny_start
from tests.training_pairs import VOCABULARY


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny models gain nothing from threads, which wait for each other on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and tokenizer of a one-layer Qwen3, without weights."""
    return write_tiny_start(tmp_path_factory.mktemp("start"), words=VOCABULARY)
