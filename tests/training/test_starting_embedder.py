"""Before any training the bundled embedder finds equal words, rare ones first."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel

from qbatch.models.tokenization import QWEN3_END
from qbatch.quickstart.starting_point import VOCABULARY, query_text, write_start
from qbatch.training.starting_embedder import log_rarity

DOCUMENTS = [
    "the game of chess with a clock",
    "the editor of texts with a menu",
    "the server of mail with a queue",
    "the game of cards with a menu",
]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bag") / "start"
    write_start(folder, ["chess", "mail"], DOCUMENTS * 20)
    return folder


def vectors(folder: Path, texts: list[str]) -> torch.Tensor:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    for text in texts:
        ids = [*tokenizer.encode(text).ids, tokenizer.token_to_id(QWEN3_END)]
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])
    return torch.nn.functional.normalize(torch.stack(found), dim=1)


def test_a_query_finds_the_document_with_its_words(start):
    queries = ["chess clock", "editor of texts", "mail queue", "cards"]
    cosines = vectors(start, [query_text(q) for q in queries]) @ vectors(start, DOCUMENTS).T
    assert cosines.argmax(1).tolist() == [0, 1, 2, 3]


def test_order_counts_little(start):
    one, other = vectors(start, ["chess game clock menu queue", "queue menu clock game chess"])
    assert one @ other > 0.99


def test_what_is_rare_weighs_more_as_its_idf_says(start):
    """The vector of two words lies nearer to the rarer one."""
    both, rare, common = vectors(start, ["chess the", "chess", "the"])
    assert both @ rare > 0.8
    assert both @ common < 0.6


def test_rarity_is_the_logarithm_of_idf(start):
    tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
    found = log_rarity(tokenizer, ["the chess", "the mail", "the the"], VOCABULARY)
    chess, the = (tokenizer.token_to_id(word) for word in ("chess", "the"))
    assert np.exp(found[chess]) == pytest.approx(np.log(4 / 2))
    assert np.exp(found[the]) == pytest.approx(np.log(4) / 1000)  # in all texts: idf would be 0


def test_the_config_is_of_the_weights(start):
    config = json.loads((start / "config.json").read_text())
    model = AutoModel.from_pretrained(start, dtype=torch.float32)
    assert model.embed_tokens.weight.shape == (config["vocab_size"], config["hidden_size"])
