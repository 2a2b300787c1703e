import pytest
from tokenizers import Tokenizer

from qbatch.errors import ConfigError
from qbatch.models.prompts import document_prompt, query_prompt, qwen3_query_prompt
from tests import assets

DEFAULT = (
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
)


def test_the_qwen3_prompt_is_exact_to_the_token():
    assert qwen3_query_prompt() == DEFAULT
    tokenizer = Tokenizer.from_file(str(assets.qwen3_tokenizer() / "tokenizer.json"))
    prefix = [641, 1235, 25, 16246, 264, 3482, 2711, 3239, 11, 17179, 9760, 46769, 429, 4226, 279]
    expected = [*prefix, 3239, 198, 2859, 25]
    assert tokenizer.encode(qwen3_query_prompt()).ids == expected
    # "What" directly after the colon is 3838; a space before it would give 3555.
    assert tokenizer.encode(qwen3_query_prompt() + "What").ids == [*expected, 3838]


def test_an_instruction_takes_the_place_of_the_default():
    prompt = query_prompt({"query": DEFAULT}, architecture="qwen3", instruction="Find code")
    assert prompt == "Instruct: Find code\nQuery:"


def test_without_an_instruction_the_stored_prompt_is_used():
    assert query_prompt({"query": "mine: "}, architecture="qwen3") == "mine: "
    assert query_prompt({"query": "query: "}, architecture="bert") == "query: "
    assert query_prompt({}, architecture="qwen3") == DEFAULT
    assert query_prompt({}, architecture="bert") == ""


def test_an_instruction_for_a_model_without_one_is_refused():
    with pytest.raises(ConfigError, match="'Find code' for a 'bert' model"):
        query_prompt({}, architecture="bert", instruction="Find code")


def test_documents_get_a_prompt_only_where_the_model_stores_one():
    assert document_prompt({"query": DEFAULT}) == ""
    assert document_prompt({"passage": "passage: "}) == "passage: "
    assert document_prompt({"document": "", "passage": "passage: "}) == ""
