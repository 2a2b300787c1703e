"""Chat completions: what a language model is asked, and a server as engine. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qbatch.models.server import Server, ServerConfig, field_of

TOO_LONG = "prompt_too_long"
"""The prompt leaves no room for an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """One question to a model."""

    system: str
    user: str
    seed: int
    """Equal requests with equal seeds get equal answers, as far as the engine can promise it."""
    max_tokens: int
    """Of the answer."""
    temperature: float
    """0 is the likeliest answer."""
    top_p: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatReply:
    """What came back."""

    text: str = ""
    is_cut: bool = False
    """The answer ended because of ``max_tokens``."""
    reason: str | None = None
    """Why there is no answer: server.REFUSED, server.FAILED, TOO_LONG."""
    detail: str = ""


class ChatEngine(Protocol):
    """Anything that answers."""

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        """Return one reply a request, in order."""


class ChatServer:
    """Asks a server, many requests at a time."""

    def __init__(self, config: ServerConfig) -> None:
        """Prepare to ask; nothing is sent yet."""
        self._server = Server(config, "/chat/completions")

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        """Return one reply a request, in order.

        Raises:
            ConfigError: The server refuses the key, or knows no such model or address.
            StalledError: The server answers nobody any more.
        """
        answers = self._server.ask([_body(request) for request in requests], _reply)
        return [a.value or ChatReply(reason=a.reason, detail=a.detail) for a in answers]


def _body(request: ChatRequest) -> dict[str, Any]:
    return {
        "messages": [
            {"role": role, "content": content}
            for role, content in (("system", request.system), ("user", request.user))
            if content
        ],
        "seed": request.seed % 2**31,  # some servers hold it in 32 bits
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
    }


def _reply(data: bytes) -> ChatReply:
    """Read a completion; ValueError for anything else."""
    choice, text = field_of(data, "a chat completion", _choice_and_text)
    if not isinstance(text, str):
        raise ValueError(f"a completion without text: {choice!r}")
    return ChatReply(text=text, is_cut=choice.get("finish_reason") == "length")


def _choice_and_text(reply: Any) -> tuple[dict[str, Any], Any]:  # noqa: ANN401 - as it was sent
    choice = reply["choices"][0]
    return choice, choice["message"]["content"]
