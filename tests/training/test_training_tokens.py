"""Rows of the pairs table to texts with prompts, and which documents are the same."""

import numpy as np
import pyarrow as pa
import pytest

from qbatch.errors import ConfigError
from qbatch.models.loading import load_spec
from qbatch.models.tokenization import TextTokenizer
from qbatch.schema import TRAINING_PAIRS
from qbatch.training.tokens import EmbeddingReader, document_keys
from tests import assets


def rows_of(*rows: dict) -> pa.Table:
    return pa.Table.from_pylist([dict.fromkeys(TRAINING_PAIRS.names) | row for row in rows])


@pytest.fixture(scope="module")
def qwen3_reader(make_qwen3) -> EmbeddingReader:
    path = make_qwen3()
    return EmbeddingReader(load_spec(path), TextTokenizer.load(path, 64), None)


def texts(reader: EmbeddingReader, tokens) -> list[str]:
    backend = reader._tokenizer._tokenizer
    parts = np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])
    return [backend.decode(part.tolist(), skip_special_tokens=False) for part in parts]


def test_texts_are_those_of_the_embed_and_search_jobs(qwen3_reader):
    rows = rows_of(
        {"query": "what?", "document": "this", "negatives": ["that", "<|im_end|>"]},
        {"query": "a", "document": "b", "instruction": "Match", "document_instruction": "Match"},
    )
    tokens = qwen3_reader.read(rows, np.arange(2), num_negatives=3, seed=[0])
    assert texts(qwen3_reader, tokens) == [
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
        "Query:what?<|endoftext|>",
        "this<|endoftext|>",
        "that<|endoftext|>",
        "<|im_end|><|endoftext|>",
        "Instruct: Match\nQuery:a<|endoftext|>",
        "Instruct: Match\nQuery:b<|endoftext|>",
    ]
    assert tokens.lengths[3] > 2  # a special token inside a text is text
    assert tokens.places.tolist() == [0, 1, 2, 3, 5, 6]
    assert tokens.present.tolist() == [[True, True, False], [False, False, False]]


def test_long_texts_are_cut_and_keep_their_end(qwen3_reader):
    rows = rows_of({"query": "q", "document": "word " * 200})
    tokens = qwen3_reader.read(rows, np.arange(1), num_negatives=0, seed=[0])
    assert tokens.lengths[1] == 64
    assert tokens.ids[-1] == 151_643


def test_documents_are_the_same_if_text_or_id_are():
    def same(a, b):
        return any(x == y for x, y in zip(document_keys(*a), document_keys(*b), strict=True))

    assert same(("text", "1"), ("text", "2"))
    assert same(("text", "1"), ("other", "1"))
    assert same(("text", None), ("text", "1"))
    assert same(("text", None), ("text", None))
    assert not same(("text", "1"), ("other", "2"))
    assert not same(("text", None), ("other", None))
    assert not same(("1", None), ("other", "1"))  # a text that reads like an id is none


def test_keys_follow_the_chosen_negatives(qwen3_reader):
    negatives = [f"n{i}" for i in range(9)]
    ids = [f"id{i}" for i in range(9)]
    rows = rows_of({"query": "q", "document": "d", "negatives": negatives, "negative_ids": ids})
    tokens = qwen3_reader.read(rows, np.array([5]), num_negatives=3, seed=[0])
    chosen = [text.removesuffix("<|endoftext|>") for text in texts(qwen3_reader, tokens)[2:]]
    expected = [document_keys(text, text.replace("n", "id")) for text in chosen]
    assert tokens.keys[0, 1:].tolist() == [list(keys) for keys in expected]
    again = qwen3_reader.read(rows, np.array([5]), num_negatives=3, seed=[1])
    assert texts(qwen3_reader, again)[2:] != texts(qwen3_reader, tokens)[2:]


def test_a_model_without_a_place_for_instructions_refuses_them():
    path = assets.minilm()
    reader = EmbeddingReader(load_spec(path), TextTokenizer.load(path), None)
    rows = rows_of({"query": "q", "document": "d", "instruction": "Find"})
    with pytest.raises(ConfigError, match="An instruction was given for a model that takes none"):
        reader.read(rows, np.arange(1), num_negatives=0, seed=[0])
