"""What a language model is asked when it writes training pairs, and how its answers are read.

The structure is that of the Qwen3 Embedding report (arXiv 2506.05176, section 3.3 and appendix
A.1): first a configuration - who asks, what kind of question, how hard - then the query. The
wording is ours, and versioned: every change of it raises TEMPLATE_VERSION.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qbatch.training.near_duplicates import normalised

TEMPLATE_VERSION = 2

MALFORMED_RESPONSE = "malformed_response"
"""The answer is not the JSON that was asked for."""
WRONG_FIELDS = "wrong_fields"
"""The answer is JSON with other keys, types or values."""
UNUSABLE_TEXT = "unusable_text"
"""The answer is empty, far too long, or the passage itself."""
CUT_RESPONSE = "cut_response"
"""The answer was longer than the limit."""

TaskKind = Literal["retrieval", "bitext", "similarity", "classification"]

QUESTION_TYPES: Mapping[str, str] = {
    "keywords": "a few words as typed into a search box, no sentence",
    "acquire_knowledge": "a question that wants to learn something the passage explains",
    "summary": "a request for what the passage says as a whole",
    "yes_or_no": "a question whose answer is yes or no and can be told from the passage",
    "background": "a question about causes, history or circumstances that the passage tells of",
}
"""As in the report; what each means is ours."""

DIFFICULTIES: Mapping[str, str] = {
    "high_school": "everyday words, one simple thought",
    "university": "the terms of the field, more than one thought",
    "phd": "an expert's question that needs the passage to be understood in depth",
}

_WORDS: Mapping[str, tuple[int, int]] = {"keywords": (2, 6)}
_OTHER_WORDS = (6, 20)

_MAX_COPIED = 10
"""Spaces between words that a query may take over from the passage in one piece."""

_MAX_CHARACTERS = 1000
"""Of a query; what is longer answers something else."""

INSTRUCTIONS: Mapping[TaskKind, tuple[str | None, str | None]] = {
    "retrieval": (None, None),
    "bitext": ("Retrieve parallel sentences", "Retrieve parallel sentences"),
    "similarity": ("Retrieve semantically similar text", "Retrieve semantically similar text"),
    "classification": ("Classify the text by its topic", None),
}
"""Of query and document; None is the model's own, or none."""

_ANSWER_KEY: Mapping[TaskKind, str] = {
    "retrieval": "query",
    "bitext": "translation",
    "similarity": "text",
    "classification": "topic",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What a pair should be like, apart from what the model chooses itself."""

    language: str
    """English name; "" is the language of the passage."""
    characters: Sequence[str]
    """Candidates, at least one."""
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """Who asks, and what kind of question."""

    character: str
    question_type: str
    difficulty: str


class ResponseError(ValueError):
    """An answer that cannot be used; ``reason`` is a stable code."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def sample_configuration(wish: Wish) -> Configuration:
    """Return a configuration by chance alone: each character, type and difficulty equally often."""
    rng = np.random.default_rng([wish.seed, 1])
    character, question_type, difficulty = (
        options[int(rng.integers(len(options)))]
        for options in (wish.characters, list(QUESTION_TYPES), list(DIFFICULTIES))
    )
    return Configuration(character=character, question_type=question_type, difficulty=difficulty)


def configuration_prompt(passage: str, wish: Wish) -> tuple[str, str]:
    """Return the system and the user message that ask for a configuration."""
    system = (
        "You plan search queries for a collection of texts. You are given a passage and a numbered "
        "list of people. Choose, in this order: the person who is most likely to look for this "
        "passage; the type of question this person would ask about it; how difficult the question "
        "should be.\n"
        f"Types of question:\n{_described(QUESTION_TYPES)}\n"
        f"Difficulties:\n{_described(DIFFICULTIES)}\n"
        "Answer with one JSON object and nothing else, such as "
        '{"character": 2, "question_type": "keywords", "difficulty": "university"}, where '
        '"character" is the number of the person.'
    )
    people = "\n".join(f"{i}. {person}" for i, person in enumerate(wish.characters, 1))
    return system, f"Passage:\n{passage}\n\nPeople:\n{people}"


def _described(options: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {meaning}" for name, meaning in options.items())


def parse_configuration(text: str, wish: Wish) -> Configuration:
    """Return the configuration an answer chose.

    Raises:
        ResponseError: The answer is not exactly what was asked for.
    """
    found = _json_object(text, ("character", "question_type", "difficulty"))
    number = found["character"]
    if type(number) is not int or not 1 <= number <= len(wish.characters):
        raise ResponseError(
            WRONG_FIELDS, f"character is {number!r}, not 1 to {len(wish.characters)}"
        )
    for key, options in (("question_type", QUESTION_TYPES), ("difficulty", DIFFICULTIES)):
        if not isinstance(found[key], str) or found[key] not in options:
            raise ResponseError(WRONG_FIELDS, f"{key} is {found[key]!r}, not of {list(options)}")
    return Configuration(
        character=wish.characters[number - 1],
        question_type=str(found["question_type"]),
        difficulty=str(found["difficulty"]),
    )


def text_prompt(
    kind: TaskKind, passage: str, wish: Wish, configuration: Configuration, *, plain: bool
) -> tuple[str, str]:
    """Return the system and the user message that ask for the other half of a pair.

    Args:
        kind: Of the pair.
        passage: One half.
        wish: The language, and the seed of the length.
        configuration: For retrieval; other kinds ignore it.
        plain: Ask for the text alone, without JSON and in few words, as small models need it.
    """
    key = _ANSWER_KEY[kind]
    if plain:
        form = f"Answer with the {key} only, on one line."
    else:
        form = f'Answer with one JSON object and nothing else: {{"{key}": "..."}}.'
    language = f"in {wish.language}" if wish.language else "in the language of the passage"
    if kind == "retrieval" and plain:
        return _plain_query_prompt(passage, wish, configuration)
    if kind == "retrieval":
        return _query_prompt(passage, wish, configuration, language, form)
    task = {
        "bitext": f"Translate the passage, all of it, and write {language}.",
        "similarity": f"Say the same as the passage in other words, {language}. Keep every fact, "
        "share as few words as you can.",
        "classification": f"Name the topic of the passage in two to five words, {language}, as a "
        "heading under which it would be filed.",
    }[kind]
    return f"{task} {form}", f"Passage:\n{passage}"


def _plain_query_prompt(passage: str, wish: Wish, configuration: Configuration) -> tuple[str, str]:
    """Return a prompt of one short sentence after the passage: small models follow no more.

    Examples make it worse: SmolLM2-135M repeats them instead of its passage. Asked for "a question
    that the text answers" it writes "What is the text about?"; the beginning of a question helps.
    """
    language = f" Write it in {wish.language}." if wish.language else ""
    one_line = " ".join(passage.split())
    wanted = _PLAIN_WISHES[configuration.question_type]
    return "You write search queries.", f"{one_line}\n\n{wanted}{language}"


_BEGINNING = 'Write one short question that begins with "{}" and is answered by this.'

_PLAIN_WISHES: Mapping[str, str] = {
    "keywords": "Summarize this in five words.",
    "acquire_knowledge": _BEGINNING.format("How can I"),
    "summary": "Summarize this in one short sentence.",
    "yes_or_no": _BEGINNING.format("Is it possible to"),
    "background": _BEGINNING.format("How does"),
}


def _query_prompt(
    passage: str, wish: Wish, configuration: Configuration, language: str, form: str
) -> tuple[str, str]:
    least, most = _WORDS.get(configuration.question_type, _OTHER_WORDS)
    rng = np.random.default_rng([wish.seed, 2])
    length = int(rng.integers(least, most + 1))
    type_meaning = QUESTION_TYPES[configuration.question_type]
    system = (
        "You write search queries. You are given a person, a passage and requirements. Write the "
        "query that this person would type, without having seen the passage, and to which the "
        "passage is the best answer in a large collection. Name what the passage is about: words "
        f'such as "the passage" or "this text" say nothing to a search engine. {form}'
    )
    return system, (
        f"Person:\n{configuration.character}\n\nPassage:\n{passage}\n\nRequirements:\n"
        f"- Type: {configuration.question_type}, {type_meaning}\n"
        f"- Difficulty: {configuration.difficulty}, {DIFFICULTIES[configuration.difficulty]}\n"
        f"- Length: about {length} words\n"
        f"- Language: write {language}"
    )


def parse_text(kind: TaskKind, text: str, passage: str, *, plain: bool) -> str:
    """Return the other half of a pair from an answer.

    Raises:
        ResponseError: The answer is not exactly what was asked for, or says nothing new.
    """
    key = _ANSWER_KEY[kind]
    found = _first_line(text, key) if plain else _json_object(text, (key,))[key]
    if not isinstance(found, str):
        raise ResponseError(WRONG_FIELDS, f"{key} is {found!r}, not a text")
    found = " ".join(found.split()) if kind == "retrieval" else found.strip()
    if not any(c.isalnum() for c in found):
        raise ResponseError(UNUSABLE_TEXT, f"{key} {found!r} has no letters")
    if kind in ("retrieval", "classification") and len(found) > _MAX_CHARACTERS:
        raise ResponseError(UNUSABLE_TEXT, f"{key} has {len(found)} characters")
    own, given = normalised(found), normalised(passage)
    if own == given or (kind == "retrieval" and own in given and own.count(" ") >= _MAX_COPIED):
        raise ResponseError(UNUSABLE_TEXT, f"{key} repeats the passage")
    return found


_THINKING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)


def _json_object(text: str, keys: Sequence[str]) -> dict[str, object]:
    """Read an answer that is one object of these keys; thoughts before and a fence are taken off.

    Raises:
        ResponseError: It is anything else.
    """
    text = _THINKING.sub("", text).strip()
    if fenced := _FENCE.match(text):
        text = fenced[1]
    try:
        found = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ResponseError(MALFORMED_RESPONSE, f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ResponseError(MALFORMED_RESPONSE, "JSON, but not an object")
    if sorted(found) != sorted(keys):
        raise ResponseError(WRONG_FIELDS, f"the keys are {list(found)}, not {list(keys)}")
    return found


def _without_repeats(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _first_line(text: str, key: str) -> str:
    """Return the first line that says something, without label, bullet and quotes around it."""
    text = _THINKING.sub("", text)
    lines = (line.strip() for line in text.splitlines())
    line = next((line for line in lines if line), "")
    line = re.sub(
        rf"\A(?:[-*]\s+|\d+[.)]\s+|(?:search\s+)?{key}\s*:|answer\s*:)\s*", "", line, flags=re.I
    )
    return line.strip().strip("\"'`*\u201c\u201d\u00ab\u00bb").strip()
