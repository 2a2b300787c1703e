"""Any OpenAI-compatible server as engine: many requests at a time, sent again when it fails.

A request that fails for a while is sent again, later and later; the API key comes from the
environment of the process that asks and goes nowhere else. Imports no torch.
"""

import email.utils
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from qbatch.errors import ConfigError, StalledError

T = TypeVar("T")
Item = TypeVar("Item")

KEY_VARIABLE = "QBATCH_API_KEY"

REFUSED = "request_refused"
"""The server will not answer this request, whenever it is sent."""
FAILED = "request_failed"
"""The server failed over this request again and again while it answered others."""

_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 60.0
_MAX_RETRY_AFTER_S = 600.0
_MAX_SHOWN = 300

_NOT_REACHED = (OSError, http.client.HTTPException)
"""Time-outs and broken connections; urllib's URLError is an OSError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """An OpenAI-compatible server; it travels, connections and keys do not."""

    endpoint: str
    """Such as http://host:8000/v1; the path of what is asked for is added."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer(Generic[T]):
    """What came of one request."""

    value: T | None = None
    reason: str | None = None
    """Why there is no value: REFUSED, FAILED."""
    detail: str = ""


class Server:
    """Asks a server, many requests at a time."""

    def __init__(self, config: ServerConfig, path: str) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            config: Which server.
            path: Below the endpoint, such as /chat/completions.
        """
        self._config = config
        self._url = config.endpoint.rstrip("/") + path
        self._pool = ThreadPoolExecutor(config.concurrency, thread_name_prefix="server")
        self._jitter = random.Random()
        self._last_success = 0.0

    def ask(
        self, bodies: Sequence[Mapping[str, Any]], read: Callable[[bytes], T]
    ) -> list[Answer[T]]:
        """Return one answer a request, in order.

        Args:
            bodies: To be sent as JSON, with the model added.
            read: Makes sense of a reply; ValueError counts as a failure of the server.

        Raises:
            ConfigError: The server refuses the key, or knows no such model or address.
            StalledError: The server answers nobody any more.
        """
        return list(self._pool.map(lambda body: self._ask(body, read), bodies))

    def ask_batches(
        self,
        batches: Sequence[Sequence[Item]],
        body: Callable[[Sequence[Item]], Mapping[str, Any]],
        read: Callable[[bytes], Sequence[T]],
    ) -> list[list[T | None]]:
        """Return the values of each batch, in order; None for an item that is refused even alone.

        Args:
            batches: Each becomes one request; of a refused one each item is asked for alone.
            body: Makes a request of items.
            read: Makes values of a reply, one an item; ValueError counts as a failure.

        Raises:
            ConfigError: Also where the server refuses all of several items, each alone.
            StalledError: The server answers nobody any more, or gives a wrong number of values.
        """
        answers = self.ask([body(batch) for batch in batches], read)
        return [
            _checked(answer.value, batch)
            if answer.value is not None
            else self._one_by_one(batch, body, read, answer.detail)
            for batch, answer in zip(batches, answers, strict=True)
        ]

    def _one_by_one(
        self,
        batch: Sequence[Item],
        body: Callable[[Sequence[Item]], Mapping[str, Any]],
        read: Callable[[bytes], Sequence[T]],
        detail: str,
    ) -> list[T | None]:
        """Ask for the items of a refused request alone: one of them is at fault."""
        if len(batch) == 1:
            return [None]
        answers = self.ask([body([item]) for item in batch], read)
        if all(answer.value is None for answer in answers):
            raise ConfigError(
                f"{self._url} refuses {len(batch)} texts, each alone: {detail}. Check that it "
                "takes token ids, that it serves this model, and its longest input"
            )
        return [
            None if answer.value is None else _checked(answer.value, [item])[0]
            for item, answer in zip(batch, answers, strict=True)
        ]

    def _ask(self, body: Mapping[str, Any], read: Callable[[bytes], T]) -> Answer[T]:
        started = time.monotonic()
        problem = ""
        for attempt in range(self._config.max_retries + 1):
            wait_s = None
            try:
                value = read(self._send(body))
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"{error.code} {error.read(_MAX_SHOWN).decode(errors='replace')}"
                    if error.code != 429 and error.code < 500:
                        return self._refusal(error.code, problem)
                    wait_s = retry_after(error.headers.get("Retry-After"))
            except (*_NOT_REACHED, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                self._last_success = time.monotonic()
                return Answer(value=value)
            if attempt < self._config.max_retries:
                time.sleep(self._delay(attempt) if wait_s is None else wait_s)
        if self._last_success > started:
            return Answer(reason=FAILED, detail=problem)
        raise StalledError(
            f"{self._url} answered none of {self._config.max_retries + 1} requests "
            f"(--max-retries), the last time: {problem}. Finished units are kept; see to the "
            "server and run the job again to go on"
        )

    def _send(self, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "qbatch"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps({"model": self._config.model, **body}).encode()
        message = urllib.request.Request(self._url, data, headers)
        with urllib.request.urlopen(message, timeout=self._config.timeout_s) as response:
            reply: bytes = response.read()
        return reply

    def _refusal(self, code: int, problem: str) -> Answer[T]:
        if code in (401, 403, 404):
            raise ConfigError(
                f"{self._url} refuses model {self._config.model!r}: {problem}. Check --endpoint "
                f"and --model; the key is read from {KEY_VARIABLE} on every machine that asks"
            )
        return Answer(reason=REFUSED, detail=problem)

    def _delay(self, attempt: int) -> float:
        """Return seconds to wait: exponential with full jitter, so that clients drift apart."""
        return self._jitter.uniform(0, min(_MAX_DELAY_S, _FIRST_DELAY_S * 2**attempt))


def _checked(values: Sequence[T], batch: Sequence[object]) -> list[T | None]:
    if len(values) != len(batch):
        raise StalledError(
            f"the server gave {len(values)} values for {len(batch)} texts; see to it and run the "
            "job again to go on"
        )
    return list(values)


def field_of(data: bytes, what: str, find: Callable[[Any], T]) -> T:
    """Return a part of a JSON reply; ValueError where it is none of that kind."""
    try:
        return find(json.loads(data))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not {what}: {data[:_MAX_SHOWN]!r}") from error


def retry_after(value: str | None) -> float | None:
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
