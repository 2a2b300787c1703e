"""A completions server gives the log-odds of the model in this process, whatever happens."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from qbatch.errors import ConfigError, StalledError
from qbatch.models.remote_reranker import RemoteReranker
from qbatch.models.rerank_templates import answer_ids
from qbatch.models.rerank_tokens import CandidateGroup, CandidateTokens
from qbatch.models.reranker import Reranker, RerankerConfig
from qbatch.models.server import ServerConfig
from tests.completion_server import CompletionState, completion_server
from tests.tiny_models import write_tiny_judge


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    return str(write_tiny_judge(tmp_path_factory.mktemp("judge")))


@pytest.fixture(scope="module")
def reranker(judge) -> Reranker:
    return RerankerConfig(model_path=Path(judge), dtype="float32").build()


@pytest.fixture(scope="module")
def answers(judge) -> tuple[int, int]:
    return answer_ids(Tokenizer.from_file(f"{judge}/tokenizer.json"))


@pytest.fixture(scope="module")
def groups(reranker) -> list[CandidateTokens]:
    """Queries with 0 to 40 documents, two of them the same; the last leaves no room for any."""
    rng = np.random.default_rng(0)
    words = ["plum", "rope", "sails", "at", "night", "owl", "zinc"]

    def text(length: int) -> str:
        return " ".join(rng.choice(words, length))

    made = []
    for size in (0, 40, 3, 17):
        documents = [text(int(n)) for n in rng.integers(1, 9, size)]
        documents[2:3] = documents[:1] if size > 2 else []
        made.append(CandidateGroup(query=text(2), documents=documents))
    made.append(CandidateGroup(query=text(900), documents=["too", "long"]))
    return reranker.tokenizer.encode(made)


def remote(endpoint: str, answers: tuple[int, int], **settings) -> RemoteReranker:
    server = {"model": "m", "concurrency": 4, "max_retries": 3, **settings}
    return RemoteReranker(ServerConfig(endpoint=endpoint, **server), answers)


def prompts_of(state: CompletionState, group: CandidateTokens) -> list[np.ndarray]:
    documents = np.split(group.ids, np.cumsum(group.lengths)[:-1])
    return [np.concatenate([group.before, document, group.after]) for document in documents]


def test_log_odds_are_those_of_the_model_through_all_troubles(judge, reranker, answers, groups):
    beats = []
    with completion_server(judge) as (endpoint, state):
        asked = remote(endpoint, answers)
        found = asked.score_tokens(groups, lambda: beats.append(1))
        assert state.statuses[429] + state.statuses[500] > 0
        assert sum(state.seen.values()) < 20
    for own, expected in zip(found, reranker.score_tokens(groups), strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-4)
    assert np.isnan(found[-1]).all()
    assert (asked.stats.num_pairs, asked.stats.num_rejected) == (62, 2)
    assert asked.stats.num_distinct < 60
    assert len(beats) > asked.stats.num_packs


def test_an_answer_that_is_not_listed_counts_as_the_last_that_is(judge, answers, groups):
    """Of raw lists of 20 tokens: bounds where one answer is missing, NaN where both are."""
    with completion_server(judge, processed=False, misbehaves=False) as (endpoint, state):
        found = remote(endpoint, answers).score_tokens(groups)
        missing = 0
        for keys, group in zip(found[1:-1], groups[1:-1], strict=True):
            for key, prompt in zip(keys, prompts_of(state, group), strict=True):
                logprobs = state.logprobs(prompt, answers)
                least = torch.topk(logprobs, 20).values[-1]
                yes, no = logprobs[list(answers)].tolist()
                missing += (yes < least) + (no < least)
                if yes < least and no < least:
                    assert np.isnan(key)
                else:
                    expected = max(yes, float(least)) - max(no, float(least))
                    assert key == pytest.approx(expected, abs=1e-5)
    assert missing > 0


def test_a_pair_that_the_server_refuses_gets_no_score_and_harms_no_other(
    judge, reranker, answers, groups
):
    group = groups[1]
    odd = int(np.setdiff1d(np.arange(20, 60), np.concatenate([group.ids, group.before]))[0])
    start = int(np.cumsum(group.lengths)[10])
    ids = group.ids.copy()
    ids[start] = odd
    changed = CandidateTokens(
        before=group.before, after=group.after, ids=ids, lengths=group.lengths
    )
    with completion_server(judge, misbehaves=False, refused=odd) as (endpoint, _):
        (found,) = remote(endpoint, answers).score_tokens([changed])
    (expected,) = reranker.score_tokens([changed])
    assert np.flatnonzero(np.isnan(found)).tolist() == [11]
    np.testing.assert_allclose(np.delete(found, 11), np.delete(expected, 11), atol=1e-4)


def test_what_cannot_work_ends_the_job(judge, answers, groups):
    common = int(groups[1].before[0])
    with completion_server(judge, misbehaves=False, refused=common) as (endpoint, _):
        with pytest.raises(ConfigError, match="refuses model 'unknown': 404"):
            remote(endpoint, answers, model="unknown").score_tokens(groups)
        with pytest.raises(ConfigError, match=r"each alone: 400 .*I do not take this"):
            remote(endpoint, answers).score_tokens(groups)
    with pytest.raises(StalledError, match="answered none of 1 requests"):
        remote(endpoint, answers, max_retries=0).score_tokens(groups)


def test_nothing_to_score_is_no_request(judge, answers, groups):
    with completion_server(judge) as (endpoint, state):
        (keys,) = remote(endpoint, answers).score_tokens(groups[:1])
    assert len(keys) == 0
    assert not state.seen
