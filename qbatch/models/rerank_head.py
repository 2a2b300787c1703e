"""The one row of a reranker's head that its scores need, read without the rest of the head."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from qbatch.errors import ConfigError
from qbatch.models.rerank_loading import CLASS_ROW, RerankerSpec, tensor_files
from qbatch.models.rerank_templates import answer_ids


def read_answer_row(spec: RerankerSpec) -> torch.Tensor:
    """Return what the last hidden state is multiplied with for the log-odds of yes against no.

    It is the difference of two rows of the language-model head, or the ready-made classifier.

    Returns:
        float32, shape (hidden_dim,).

    Raises:
        ConfigError: The checkpoint has no such head.
    """
    if spec.head == "decoder-class":
        return _read_rows(spec.path, CLASS_ROW, [0])[0]
    file = str(spec.path / "tokenizer.json")
    rows = _read_rows(spec.path, _head_name(spec), answer_ids(Tokenizer.from_file(file)))
    return rows[0] - rows[1]


def _head_name(spec: RerankerSpec) -> str:
    """Return the stored tensor that is the head; the table of embeddings only where it is tied.

    A stored head counts even where the config calls it tied, as it does in transformers.
    """
    names = tensor_files(spec.path)
    if "lm_head.weight" in names:
        return "lm_head.weight"
    tables = [name for name in names if name.endswith("embed_tokens.weight")]
    if not spec.is_tied or not tables:
        raise ConfigError(
            f"No language-model head in {spec.path}: lm_head.weight is missing and "
            f"tie_word_embeddings is {spec.is_tied}. The scores would be meaningless; copy the "
            "whole reranker, not its embedding part."
        )
    return tables[0]


def _read_rows(path: Path, name: str, rows: Sequence[int]) -> torch.Tensor:
    """Return rows of a stored tensor, float32, without reading the rest of it."""
    file = tensor_files(path).get(name)
    if file is None:
        raise ConfigError(
            f"Weights are missing in {path}: {name}. The reranker's head is made of it; copy the "
            "model again."
        )
    with safe_open(file, "pt") as weights:
        tensor = weights.get_slice(name)
        picked: list[torch.Tensor] = [tensor[row : row + 1] for row in rows]
    return torch.cat(picked).float()
