"""The exact strings put before a text. One character more or less moves every vector."""

from collections.abc import Mapping

from qbatch.errors import ConfigError

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""The task sentence of the Qwen3-Embedding model card; worth 1 to 5 % over none."""


def qwen3_query_prompt(instruction: str = DEFAULT_INSTRUCTION) -> str:
    """Return what Qwen3-Embedding expects before a query; no space follows ``Query:``."""
    return f"Instruct: {instruction}\nQuery:"


def query_prompt(
    prompts: Mapping[str, str], *, architecture: str, instruction: str | None = None
) -> str:
    """Return the prompt of queries: Qwen3's form, or the one stored beside any other model.

    Args:
        prompts: ``ModelSpec.prompts``.
        architecture: ``ModelSpec.architecture``.
        instruction: Task sentence in English; None means the model's own default.

    Raises:
        ConfigError: An instruction was given for a model that has no place for it.
    """
    if architecture == "qwen3":
        if instruction is None and "query" in prompts:
            return prompts["query"]
        return qwen3_query_prompt(instruction or DEFAULT_INSTRUCTION)
    if instruction is not None:
        raise ConfigError(
            f"An instruction was given for a model that takes none: {instruction!r} for a "
            f"{architecture!r} model; only Qwen3 models take one. Remove the instruction."
        )
    return prompts.get("query", "")


def document_prompt(prompts: Mapping[str, str]) -> str:
    """Return the prompt of documents; Qwen3 has none, E5 stores one as ``passage``."""
    return prompts.get("document", prompts.get("passage", ""))
