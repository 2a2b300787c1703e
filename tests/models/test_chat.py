"""The client of chat servers against a real one that misbehaves."""

import logging
import time
from email.utils import formatdate

import pytest

from qbatch.errors import ConfigError, StalledError
from qbatch.models.chat import ChatRequest, ChatServer
from qbatch.models.server import FAILED, KEY_VARIABLE, REFUSED, ServerConfig, retry_after
from tests.chat_server import KEY, answer_to, chat_server, fate_of

SYSTEM = 'Answer {"query": "..."}'


def ask(passage: str, seed: int = 0) -> ChatRequest:
    return ChatRequest(
        system=SYSTEM,
        user=f"Passage:\n{passage}",
        seed=seed,
        max_tokens=50,
        temperature=0.5,
        top_p=0.9,
    )


def test_every_request_gets_its_answer_in_order_through_all_troubles(monkeypatch, caplog):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    requests = [ask(f"passage number {i}") for i in range(60)]
    fates = {fate_of(r.system + r.user) for r in requests}
    assert {"429", "500", "hang-up", "slow", "broken-json"} <= fates
    with chat_server() as (endpoint, state), caplog.at_level(logging.DEBUG):
        engine = ChatServer(ServerConfig(endpoint=endpoint, model="m", concurrency=7))
        replies = engine.complete(requests)
    for request, reply in zip(requests, replies, strict=True):
        assert reply.reason is None
        fate = fate_of(request.system + request.user)
        if fate == "broken-json":
            assert reply.text.endswith("in the midd")  # not the client's to judge
        else:
            assert answer_to(request.system, request.user) in reply.text
    assert state.statuses[429] > 0
    assert state.statuses[500] > 0
    assert 1 < state.most_at_once <= 7
    assert state.keys == {f"Bearer {KEY}"}
    assert KEY not in caplog.text


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with chat_server(misbehaves=False) as (endpoint, state):
        ChatServer(ServerConfig(endpoint=endpoint, model="m")).complete([ask("x y z")])
    assert state.keys == {None}


def test_a_cut_answer_says_so():
    with chat_server(misbehaves=False) as (endpoint, _):
        engine = ChatServer(ServerConfig(endpoint=endpoint, model="m"))
        replies = engine.complete([ask("an endless one"), ask("a short one")])
    assert [reply.is_cut for reply in replies] == [True, False]


def test_what_is_refused_is_asked_once_and_what_only_fails_is_given_up_alone():
    config = {"model": "m", "max_retries": 1}
    with chat_server(misbehaves=False, delay_s=0.05) as (endpoint, state):
        engine = ChatServer(ServerConfig(endpoint=endpoint, concurrency=2, **config))
        asked = [ask("refused"), ask("always fails"), *(ask(f"good {i}") for i in range(40))]
        replies = engine.complete(asked)
    assert [reply.reason for reply in replies[:3]] == [REFUSED, FAILED, None]
    assert "not allowed" in replies[0].detail
    assert "breaks me" in replies[1].detail
    assert state.seen[SYSTEM + asked[0].user] == 1
    assert state.seen[SYSTEM + asked[1].user] == 2


def test_a_server_that_answers_nobody_ends_the_job():
    with chat_server(misbehaves=False) as (endpoint, state):
        state.is_down = True
        engine = ChatServer(ServerConfig(endpoint=endpoint, model="m", max_retries=1))
        with pytest.raises(StalledError, match=r"answered none of 2 requests .* 503 "):
            engine.complete([ask("x")])
    with pytest.raises(StalledError, match="the last time: URLError"):
        engine.complete([ask("nobody is there any more")])


def test_a_slow_server_times_out():
    with chat_server(misbehaves=False, delay_s=1.0) as (endpoint, _):
        engine = ChatServer(
            ServerConfig(endpoint=endpoint, model="m", max_retries=0, timeout_s=0.1)
        )
        with pytest.raises(StalledError, match="TimeoutError"):
            engine.complete([ask("x")])


def test_wrong_model_or_key_is_a_matter_of_settings():
    with chat_server(misbehaves=False) as (endpoint, _):
        engine = ChatServer(ServerConfig(endpoint=endpoint, model="unknown"))
        with pytest.raises(ConfigError, match="refuses model 'unknown': 404"):
            engine.complete([ask("x")])


def testretry_after_is_seconds_or_a_date():
    assert retry_after("1.5") == 1.5
    assert retry_after("-3") == 0
    assert retry_after("99999") == 600
    assert retry_after(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=3)
    assert retry_after("soon") is None
    assert retry_after(None) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"endpoint": "localhost:8000"}, "endpoint is 'localhost:8000'; give a URL"),
        ({"concurrency": 0}, "concurrency is 0; give 1 or more"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"timeout_s": 0}, "timeout_s is 0"),
    ],
)
def test_bad_settings_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**{"endpoint": "http://x", "model": "m", **flags})
