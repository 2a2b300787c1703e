"""Before any training the bundled reranker sees which words of a document its query has."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from qbatch.models.rerank_prompts import (
    DOCUMENT_LABEL,
    JUDGE_END,
    JUDGE_START,
    NO,
    YES,
    judge_opening,
)
from qbatch.quickstart.starting_point import INSTRUCTION, write_start
from qbatch.training.starting_reranker import write_matcher

WORDS = ["game", "chess", "cards", "clock", "menu", "editor", "texts", "server", "mail", "queue"]
FILLER = " with a menu" * 12


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("matcher")
    documents = [f"the {one} of {other} with a menu" for one in WORDS for other in WORDS]
    write_start(folder / "embedder", WORDS, documents)
    write_matcher(folder / "embedder", folder / "reranker")
    return folder / "reranker"


def prompt(query: str, document: str) -> str:
    opening = JUDGE_START + judge_opening(INSTRUCTION)
    return f"{opening} {query}\n{DOCUMENT_LABEL} {document}{JUDGE_END}"


def log_odds(folder: Path, query: str, documents: list[str]) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    yes, no = (tokenizer.token_to_id(answer) for answer in (YES, NO))
    found = []
    for document in documents:
        text = prompt(query, document + FILLER)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        found.append(float(logits[yes] - logits[no]))
    return found


def test_the_more_words_of_the_query_the_higher(start):
    documents = ["the game of chess", "the game of cards", "the editor of texts"]
    both, one, none = log_odds(start, "chess game", documents)
    assert both > one + 0.1 > none + 0.2


def test_what_the_prompt_says_is_not_the_query(start):
    answers, other = log_odds(start, "chess game", ["the answer to mail", "the server of mail"])
    assert answers < other + 0.1


def test_a_second_occurrence_counts_less_than_the_first(start):
    documents = ["queue queue", "chess queue", "chess chess"]
    none, once, twice = log_odds(start, "chess", documents)
    assert 0 < twice - once < 0.9 * (once - none)


def test_rare_words_count_more(start):
    rare, common = log_odds(start, "chess with", ["the chess of mail", "the with of mail"])
    assert rare > common + 0.1


def test_another_query_matches_other_words(start):
    documents = ["the game of chess", "the server of mail"]
    assert log_odds(start, "chess", documents)[0] > log_odds(start, "chess", documents)[1]
    assert log_odds(start, "mail", documents)[0] < log_odds(start, "mail", documents)[1]
