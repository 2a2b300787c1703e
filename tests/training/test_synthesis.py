"""Prompts and the strict reading of answers."""

import json
from collections import Counter

import pytest

from qbatch.training.personas import default_personas
from qbatch.training.synthesis import (
    DIFFICULTIES,
    MALFORMED_RESPONSE,
    QUESTION_TYPES,
    UNUSABLE_TEXT,
    WRONG_FIELDS,
    Configuration,
    ResponseError,
    Wish,
    configuration_prompt,
    parse_configuration,
    parse_text,
    sample_configuration,
    text_prompt,
)

WISH = Wish(language="German", characters=["a nurse", "a cook", "a pilot"], seed=5)
CHOSEN = {"character": 2, "question_type": "summary", "difficulty": "phd"}
PASSAGE = "Copper conducts heat."
COPIED = "a long sentence of many words that the passage says just like this here"


def test_a_configuration_is_read_as_it_was_asked_for():
    system, user = configuration_prompt(PASSAGE, WISH)
    assert "2. a cook" in user
    assert PASSAGE in user
    assert all(name in system for name in [*QUESTION_TYPES, *DIFFICULTIES])
    example = system[system.index('{"character"') : system.index("}") + 1]
    assert parse_configuration(example, WISH).character == "a cook"
    wanted = Configuration(character="a cook", question_type="summary", difficulty="phd")
    answer = json.dumps(CHOSEN)
    for text in (
        answer,
        f"\n {answer} \n",
        f"```json\n{answer}\n```",
        f"<think>\nwhat {{}}\n</think>\n\n{answer}",
    ):
        assert parse_configuration(text, WISH) == wanted


@pytest.mark.parametrize(
    ("answer", "reason", "detail"),
    [
        ("", MALFORMED_RESPONSE, "not JSON"),
        ("Sure! " + json.dumps(CHOSEN), MALFORMED_RESPONSE, "not JSON"),
        (json.dumps(CHOSEN)[:-1], MALFORMED_RESPONSE, "not JSON"),
        ("[1]", MALFORMED_RESPONSE, "not an object"),
        ("[" * 100_000, MALFORMED_RESPONSE, "not JSON"),
        ('{"character": 1, "character": 2}', MALFORMED_RESPONSE, "a key stands twice"),
        ('{"character": 1}', WRONG_FIELDS, "the keys are"),
        (json.dumps({**CHOSEN, "why": "so"}), WRONG_FIELDS, "the keys are"),
        (json.dumps({**CHOSEN, "character": 0}), WRONG_FIELDS, "character is 0, not 1 to 3"),
        (json.dumps({**CHOSEN, "character": True}), WRONG_FIELDS, "character is True"),
        (json.dumps({**CHOSEN, "character": "a cook"}), WRONG_FIELDS, "character is 'a cook'"),
        (json.dumps({**CHOSEN, "question_type": "odd"}), WRONG_FIELDS, "question_type is 'odd'"),
        (json.dumps({**CHOSEN, "difficulty": None}), WRONG_FIELDS, "difficulty is None"),
    ],
)
def test_other_configurations_are_refused_with_a_stable_reason(answer, reason, detail):
    with pytest.raises(ResponseError, match=detail) as caught:
        parse_configuration(answer, WISH)
    assert caught.value.reason == reason


def test_unhashable_choices_are_wrong_fields():
    with pytest.raises(ResponseError, match="question_type is") as caught:
        parse_configuration(json.dumps({**CHOSEN, "question_type": ["summary"]}), WISH)
    assert caught.value.reason == WRONG_FIELDS


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("heat conduction", "heat conduction"),
        ('  \nQuery: "heat conduction"\nbecause', "heat conduction"),
        ("Search query: heat", "heat"),
        ("- heat of copper", "heat of copper"),
        ("1. heat of copper", "heat of copper"),
        ("3D printing with copper", "3D printing with copper"),
        ("\u201cheat\u201d", "heat"),
    ],
)
def test_a_plain_answer_is_its_first_line_without_trimmings(answer, wanted):
    assert parse_text("retrieval", answer, PASSAGE, plain=True) == wanted


@pytest.mark.parametrize(
    ("answer", "plain", "reason"),
    [
        ("", True, UNUSABLE_TEXT),
        ("?!", True, UNUSABLE_TEXT),
        ("x" * 1001, True, UNUSABLE_TEXT),
        (COPIED, True, UNUSABLE_TEXT),
        ('{"query": ""}', False, UNUSABLE_TEXT),
        ('{"query": 7}', False, WRONG_FIELDS),
        ('{"question": "heat"}', False, WRONG_FIELDS),
        ("heat", False, MALFORMED_RESPONSE),
    ],
)
def test_texts_that_say_nothing_are_refused(answer, plain, reason):
    with pytest.raises(ResponseError) as caught:
        parse_text("retrieval", answer, f"{PASSAGE} {COPIED}.", plain=plain)
    assert caught.value.reason == reason


def test_the_passage_itself_is_no_query():
    with pytest.raises(ResponseError, match="repeats the passage"):
        parse_text("retrieval", "copper  conducts HEAT!", PASSAGE, plain=True)


def test_a_few_words_of_the_passage_are_no_copy():
    words = " ".join(COPIED.split()[:6])
    assert parse_text("retrieval", words, COPIED, plain=True) == words
    assert parse_text("similarity", COPIED, f"x {COPIED}", plain=True) == COPIED


def test_sampled_configurations_follow_the_seed_and_use_every_option():
    def sample(seed: int) -> Configuration:
        return sample_configuration(
            Wish(language="", characters=["a nurse", "a cook", "a pilot"], seed=seed)
        )

    assert sample(7) == sample(7)
    made = [sample(seed) for seed in range(600)]
    for name, options in (("question_type", 5), ("difficulty", 3), ("character", 3)):
        counts = Counter(getattr(one, name) for one in made)
        assert len(counts) == options
        assert min(counts.values()) > 600 / options / 2


def test_the_query_prompt_states_every_requirement():
    configuration = parse_configuration(json.dumps(CHOSEN), WISH)
    system, user = text_prompt("retrieval", PASSAGE, WISH, configuration, plain=False)
    assert '{"query": "..."}' in system
    for part in ("a cook", PASSAGE, "summary", "phd", "write in German"):
        assert part in user
    plain_system, plain_user = text_prompt("retrieval", PASSAGE, WISH, configuration, plain=True)
    assert "JSON" not in plain_system + plain_user
    wish = "Summarize this in one short sentence. Write it in German."
    assert plain_user == f"{PASSAGE}\n\n{wish}"


@pytest.mark.parametrize(
    ("kind", "key"),
    [("bitext", "translation"), ("similarity", "text"), ("classification", "topic")],
)
def test_other_kinds_have_their_own_prompt_and_key(kind, key):
    configuration = sample_configuration(WISH)
    system, user = text_prompt(kind, PASSAGE, WISH, configuration, plain=False)
    assert f'{{"{key}": "..."}}' in system
    assert "in German" in system
    assert PASSAGE in user
    assert parse_text(kind, json.dumps({key: "Kupfer"}), PASSAGE, plain=False) == "Kupfer"


def test_the_neutral_people_are_twenty_different_ones():
    people = default_personas()
    assert len(set(people)) == 20
    assert all(person == person.strip() and person for person in people)
