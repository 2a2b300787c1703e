"""A real HTTP server that speaks the completions protocol of OpenAI over a real language model.

It lists the likeliest tokens as vLLM does: of the whole vocabulary, or (``processed``) of those
that the request allows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.http_servers import MisbehavedHandler, MisbehavedState, serving


class CompletionState(MisbehavedState):
    """What the server computes with."""

    def __init__(
        self, model: str, *, misbehaves: bool, refused: int | None, processed: bool
    ) -> None:
        super().__init__(misbehaves=misbehaves, refused=refused)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.processed = processed

    @torch.inference_mode()
    def logprobs(self, prompt: Sequence[int], allowed: Sequence[int]) -> torch.Tensor:
        """Return the log-probability of each token of the vocabulary after a prompt."""
        with self.lock:
            logits = self.model(torch.tensor(np.array(prompt))[None]).logits[0, -1]
        if self.processed:
            mask = torch.full_like(logits, -1e9)
            mask[list(allowed)] = 0
            logits = logits + mask
        return torch.log_softmax(logits, dim=0)


class _Handler(MisbehavedHandler):
    served_path = "/v1/completions"
    field = "prompt"

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["max_tokens"] == 1
        assert body["return_tokens_as_token_ids"]
        choices = [
            {"index": i, "logprobs": {"top_logprobs": [self._top(body, prompt)]}}
            for i, prompt in enumerate(body["prompt"])
        ]
        return {"choices": choices[::-1]}

    def _top(self, body: dict[str, Any], prompt: list[int]) -> dict[str, float]:
        found = self.server.state.logprobs(prompt, body["allowed_token_ids"])
        values, ids = found.topk(body["logprobs"])
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return {f"token_id:{number}": value for number, value in pairs}


@contextmanager
def completion_server(
    model: str, *, misbehaves: bool = True, refused: int | None = None, processed: bool = True
) -> Iterator[tuple[str, CompletionState]]:
    """Run a server on 127.0.0.1; yield its endpoint and what it knows."""
    state = CompletionState(model, misbehaves=misbehaves, refused=refused, processed=processed)
    with serving(_Handler, state) as endpoint:
        yield endpoint, state
