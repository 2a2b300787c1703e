"""A real HTTP server that speaks the chat-completions protocol and answers from the prompt alone.

It misbehaves as real ones do, decided by the prompt: the first time it meets some prompts it says
429 or 500, hangs up, or gives broken JSON; some passages are hopeless for good.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.http_servers import JsonHandler, serving

KEY = "a-secret-key"

SOURCES = ("429", "500", "hang-up", "broken-json", "slow", "fenced", "fine", "fine")


class ChatState:
    """What the server was asked, and how it is to behave."""

    def __init__(self, *, misbehaves: bool, delay_s: float = 0.0) -> None:
        self.misbehaves = misbehaves
        self.delay_s = delay_s
        self.is_down = False
        self.lock = threading.Lock()
        self.seen: Counter[str] = Counter()
        self.passages: Counter[str] = Counter()
        self.keys: set[str | None] = set()
        self.most_at_once = 0
        self.at_once = 0
        self.statuses: Counter[int] = Counter()


def fate_of(prompt: str) -> str:
    digest = hashlib.sha256(prompt.encode()).digest()
    return SOURCES[digest[0] % len(SOURCES)]


def query_for(passage: str) -> str:
    """Return the query the server writes for a passage."""
    return "about " + " ".join(passage.split()[:3])


def passage_of(user: str) -> str:
    """Return the passage of any of the templates."""
    return user.partition("Passage:\n")[2].partition("\n\n")[0] or user.partition("\n\n")[0]


def answer_to(system: str, user: str) -> str:
    """Return the right answer to a prompt."""
    passage = passage_of(user)
    if '"character"' in system:
        number = 1 + len(passage) % 5
        chosen = {"character": number, "question_type": "summary", "difficulty": "phd"}
        return json.dumps(chosen)
    if '"query"' in system:
        return json.dumps({"query": query_for(passage)})
    if '"translation"' in system:
        return json.dumps({"translation": passage[::-1]})
    if '"text"' in system:
        return json.dumps({"text": "otherwise: " + passage})
    if '"topic"' in system:
        return json.dumps({"topic": passage.split()[0]})
    return f'Query: "{query_for(passage)}"\nand more'


class _Handler(JsonHandler):
    def answer(self, body: dict[str, Any]) -> None:
        state = self.server.state
        with state.lock:
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
        try:
            self._respond(state, body)
        finally:
            with state.lock:
                state.at_once -= 1

    def _respond(self, state: ChatState, body: dict[str, Any]) -> None:
        system, user = (message["content"] for message in body["messages"])
        prompt = system + user
        with state.lock:
            first = not state.seen[prompt]
            state.seen[prompt] += 1
            state.keys.add(self.headers.get("Authorization"))
        time.sleep(state.delay_s)
        if state.is_down:
            self.send_json(503, {"error": "down"})
        elif "refused" in user:
            self.send_json(400, {"error": "this is not allowed"})
        elif body["model"] == "unknown":
            self.send_json(404, {"error": "no such model"})
        elif "always fails" in user:
            self.send_json(500, {"error": "this one breaks me"})
        elif state.misbehaves and first and self._misbehave(fate_of(prompt)):
            pass
        else:
            text = answer_to(system, user)
            if "hopeless" in user:
                text = "I would rather talk about something else"
            elif "invented" in user:
                text = '{"character": 9, "question_type": "other", "difficulty": "phd"}'
            elif fate_of(prompt) == "fenced" and text.startswith("{"):
                text = f"<think>\nlet me see\n</think>\n```json\n{text}\n```"
            with state.lock:
                state.passages[passage_of(user)] += 1
            self._completion(text, "length" if "endless" in user else "stop")

    def _misbehave(self, fate: str) -> bool:
        if fate == "429":
            self.send_json(429, {"error": "slow down"}, {"Retry-After": "0.05"})
        elif fate == "500":
            self.send_json(500, {"error": "oops"})
        elif fate == "hang-up":
            self.connection.close()
        elif fate == "broken-json":
            self._completion('{"query": "cut in the midd', "stop")
        elif fate == "slow":
            time.sleep(0.3)
            return False
        else:
            return False
        return True

    def _completion(self, text: str, finish_reason: str) -> None:
        message = {"role": "assistant", "content": text}
        self.send_json(200, {"choices": [{"message": message, "finish_reason": finish_reason}]})


@contextmanager
def chat_server(
    *, misbehaves: bool = True, delay_s: float = 0.0
) -> Iterator[tuple[str, ChatState]]:
    """Run a server in a thread; yield its endpoint and its state."""
    state = ChatState(misbehaves=misbehaves, delay_s=delay_s)
    with serving(_Handler, state) as endpoint:
        yield endpoint, state
