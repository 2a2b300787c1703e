"""Chat completions: what a language model is asked, and any OpenAI-compatible server as engine.

A request that fails for a while is sent again, later and later; the API key comes from the
environment of the process that asks and goes nowhere else. Imports no torch.
"""

import email.utils
import http.client
import json
import logging
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from qbatch.errors import ConfigError, StalledError

log = logging.getLogger(__name__)

KEY_VARIABLE = "QBATCH_API_KEY"

REFUSED = "request_refused"
"""The server will not answer this request, whenever it is sent."""
FAILED = "request_failed"
"""The server failed over this request again and again while it answered others."""
TOO_LONG = "prompt_too_long"
"""The prompt leaves no room for an answer."""

_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 60.0
_MAX_RETRY_AFTER_S = 600.0
_MAX_SHOWN = 300

_NOT_REACHED = (OSError, http.client.HTTPException)
"""Time-outs and broken connections; urllib's URLError is an OSError."""


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
    """Why there is no answer: REFUSED, FAILED, TOO_LONG."""
    detail: str = ""


class ChatEngine(Protocol):
    """Anything that answers."""

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        """Return one reply a request, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatServerConfig:
    """An OpenAI-compatible server; it travels, connections and keys do not."""

    endpoint: str
    """Such as http://host:8000/v1; /chat/completions is added."""
    model: str
    """As the server calls it."""
    concurrency: int = 32
    """Requests on their way at a time, from this process."""
    timeout_s: float = 120.0
    """For one answer."""
    max_retries: int = 8
    """How often a request is sent again after 429, 5xx, time-outs and broken connections."""

    def __post_init__(self) -> None:
        if not self.endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"endpoint is {self.endpoint!r}; give a URL such as http://host:8000/v1"
            )
        for name, least in (("concurrency", 1), ("max_retries", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; give {least} or more")
        if self.timeout_s <= 0:
            raise ConfigError(f"timeout_s is {self.timeout_s}; give seconds above 0")

    def build(self) -> "ChatServer":
        """Return a client; nothing is sent yet."""
        return ChatServer(self)


class ChatServer:
    """Asks a server, many requests at a time."""

    def __init__(self, config: ChatServerConfig) -> None:
        self._config = config
        self._url = config.endpoint.rstrip("/") + "/chat/completions"
        self._pool = ThreadPoolExecutor(config.concurrency, thread_name_prefix="chat")
        self._jitter = random.Random()
        self._last_success = 0.0

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        """Return one reply a request, in order.

        Raises:
            ConfigError: The server refuses the key, or knows no such model or address.
            StalledError: The server answers nobody any more.
        """
        return list(self._pool.map(self._complete, requests))

    def _complete(self, request: ChatRequest) -> ChatReply:
        started = time.monotonic()
        problem = ""
        for attempt in range(self._config.max_retries + 1):
            wait_s = None
            try:
                reply = _reply(self._send(request))
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"{error.code} {error.read(_MAX_SHOWN).decode(errors='replace')}"
                    if error.code != 429 and error.code < 500:
                        return self._refusal(error.code, problem)
                    wait_s = _retry_after(error.headers.get("Retry-After"))
            except (*_NOT_REACHED, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                self._last_success = time.monotonic()
                return reply
            if attempt < self._config.max_retries:
                time.sleep(self._delay(attempt) if wait_s is None else wait_s)
        if self._last_success > started:
            return ChatReply(reason=FAILED, detail=problem)
        raise StalledError(
            f"{self._url} answered none of {self._config.max_retries + 1} requests "
            f"(--max-retries), the last time: {problem}. Finished units are kept; see to the "
            "server and run the job again to go on"
        )

    def _send(self, request: ChatRequest) -> bytes:
        body = {
            "model": self._config.model,
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
        headers = {"Content-Type": "application/json", "User-Agent": "qbatch"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        message = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(message, timeout=self._config.timeout_s) as response:
            data: bytes = response.read()
        return data

    def _refusal(self, code: int, problem: str) -> ChatReply:
        if code in (401, 403, 404):
            raise ConfigError(
                f"{self._url} refuses model {self._config.model!r}: {problem}. Check --endpoint "
                f"and --model; the key is read from {KEY_VARIABLE} on every machine that asks"
            )
        return ChatReply(reason=REFUSED, detail=problem)

    def _delay(self, attempt: int) -> float:
        """Return seconds to wait: exponential with full jitter, so that clients drift apart."""
        return self._jitter.uniform(0, min(_MAX_DELAY_S, _FIRST_DELAY_S * 2**attempt))


def _reply(data: bytes) -> ChatReply:
    """Read a completion; ValueError for anything else."""
    try:
        choice = json.loads(data)["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"not a chat completion: {data[:_MAX_SHOWN]!r}") from error
    if not isinstance(text, str):
        raise ValueError(f"a completion without text: {data[:_MAX_SHOWN]!r}")
    return ChatReply(text=text, is_cut=choice.get("finish_reason") == "length")


def _retry_after(value: str | None) -> float | None:
    """Return the seconds a server asks to wait, as number or date; None without either."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        date = email.utils.parsedate_tz(value)
        if date is None:
            return None
        seconds = email.utils.mktime_tz(date) - time.time()
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S)
