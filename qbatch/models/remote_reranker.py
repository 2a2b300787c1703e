"""A completions server in place of a reranker in this process: token ids in, log-odds out.

vLLM and SGLang serve Qwen3-Reranker as the language model it is. Asked for one token and its
likeliest alternatives, they tell how likely yes and no are. Prompts and truncation are ours and
exact, because token ids are sent. Imports no torch.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from qbatch.models.rerank_packing import PairSet
from qbatch.models.rerank_stats import RerankStats
from qbatch.models.rerank_tokens import CandidateTokens
from qbatch.models.server import Server, ServerConfig, field_of

_PAIRS_PER_REQUEST = 16
_TOP_LOGPROBS = 20
"""Most that vLLM lists unless it was told otherwise; the model card asks for as many."""


class RemoteReranker:
    """Scores pairs as a yes-no ``Reranker`` does, by asking a server.

    A pair that the server refuses, or fails over again and again, or after which neither yes nor no
    is among the 20 likeliest tokens, gets NaN. Where one of them is missing it counts as likely as
    the last that is listed, which is the most it can be.
    """

    def __init__(self, config: ServerConfig, answers: tuple[int, int]) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            config: Which server.
            answers: Token ids of yes and no.
        """
        self.stats = RerankStats()
        self._server = Server(config, "/completions")
        self._answers = answers

    def score_tokens(
        self, groups: Sequence[CandidateTokens], on_pack: Callable[[], None] = lambda: None
    ) -> list[np.ndarray]:
        """Return the log-odds of yes against no, as ``Reranker.score_tokens`` does.

        Raises:
            ConfigError: The server refuses the key, or knows no such model or address.
            StalledError: The server answers nobody any more.
        """
        started = time.perf_counter()
        # Pairs of a query in a row: the server has what they begin with in its cache.
        pairs = PairSet(groups, share_prefixes=True)
        starts = range(0, len(pairs), _PAIRS_PER_REQUEST)
        batches = [
            [ids.tolist() for ids in pairs.whole(i, min(i + _PAIRS_PER_REQUEST, len(pairs)))]
            for i in starts
        ]

        def read(data: bytes) -> list[float]:
            on_pack()
            return _log_odds(data, self._answers)

        on_pack()
        body = partial(_body, answers=self._answers)
        found = self._server.ask_batches(batches, body, read)
        keys = [np.nan if key is None else key for part in found for key in part]
        self.stats.count(groups, pairs)
        self.stats.num_packs += len(batches)
        self.stats.num_computed += pairs.num_tokens
        self.stats.score_s += time.perf_counter() - started
        return pairs.scatter(np.array(keys, np.float32))


def _body(prompts: Sequence[list[int]], answers: tuple[int, int]) -> dict[str, Any]:
    return {
        "prompt": list(prompts),
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": _TOP_LOGPROBS,
        "allowed_token_ids": list(answers),
        "return_tokens_as_token_ids": True,
    }


def _log_odds(data: bytes, answers: tuple[int, int]) -> list[float]:
    """Read a reply in the order of its prompts; ValueError for anything that is none."""
    return field_of(
        data,
        "completions with the likeliest tokens",
        lambda reply: [
            _of_top(choice["logprobs"]["top_logprobs"][0], answers)
            for choice in sorted(reply["choices"], key=lambda choice: choice["index"])
        ],
    )


def _of_top(top: Mapping[str, float], answers: tuple[int, int]) -> float:
    listed = [top.get(f"token_id:{answer}") for answer in answers]
    if listed == [None, None]:
        return float("nan")
    yes, no = (min(top.values()) if value is None else value for value in listed)
    return yes - no
