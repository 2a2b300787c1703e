"""The exact strings around a query and a document when a language model judges the pair."""

from qbatch.models.prompts import DEFAULT_INSTRUCTION

TEMPLATE_VERSION = 1
"""Part of every reranked run's fingerprint: raise it when any prompt of a scorer changes."""

YES, NO = "yes", "no"
"""The two answers; each must be one token."""

JUDGE_START = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
"""39 tokens before everything, special tokens included."""

JUDGE_END = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""9 tokens after every document; the answer is read after the last, which must be id 271."""

QUERY_LABEL, DOCUMENT_LABEL = "<Query>:", "<Document>:"

PASSAGE_LABEL = "Passage:"
QUESTION_LABEL = "\nQuestion about the passage:"
"""Around the pair of the query-likelihood scorer; the wording is ours."""


def judge_opening(instruction: str | None = None) -> str:
    """Return the text between ``JUDGE_START`` and the query; a space follows before the query."""
    return f"<Instruct>: {instruction or DEFAULT_INSTRUCTION}\n{QUERY_LABEL}"
