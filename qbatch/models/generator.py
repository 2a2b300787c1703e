"""A causal language model in this process as a chat engine: batches with left padding.

Sampling draws from each request's own seed, so that an answer does not depend on what else is in
its batch, but for rounding.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopPLogitsWarper,
)

from qbatch.models.chat import TOO_LONG, ChatReply, ChatRequest
from qbatch.models.devices import resolve_device, resolve_dtype
from qbatch.models.loading import read_config, read_json, refuse_remote_code, weight_files
from qbatch.schema import ComputeDtype

log = logging.getLogger(__name__)

_GPU_TOKEN_BUDGET = 65_536
_CPU_TOKEN_BUDGET = 8_192


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorConfig:
    """What a generating process needs to build its model; it travels, the model does not."""

    model_path: Path
    """What ``resolve_model`` returned."""
    dtype: Literal["auto"] | ComputeDtype = "auto"
    """Of weights and activations."""
    token_budget: int | None = None
    """Tokens of prompts and answers in one batch, padding included; None means 65,536 on a GPU,
    8,192 on a CPU."""
    num_threads: int | None = None
    """CPU threads of torch in this process; None leaves torch's setting."""

    def build(self) -> "Generator":
        """Load the model onto its device.

        Raises:
            ConfigError: The directory is unusable.
        """
        path = self.model_path
        refuse_remote_code(path, read_json(path / "tokenizer_config.json", default={}))
        config = read_config(path)
        weight_files(path)
        device = resolve_device()
        dtype = getattr(torch, resolve_dtype(self.dtype, device))
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
        default = _GPU_TOKEN_BUDGET if device.type == "cuda" else _CPU_TOKEN_BUDGET
        return Generator(
            model.to(device).eval(),
            path,
            token_budget=self.token_budget or default,
            num_threads=self.num_threads,
        )


class Generator:
    """Answers chat requests; ``GeneratorConfig.build`` is the way to get one."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - whatever class the checkpoint is of
        path: Path,
        *,
        token_budget: int,
        num_threads: int | None,
    ) -> None:
        self._model = model
        self._token_budget = token_budget
        self._num_threads = num_threads
        self._tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, padding_side="left"
        )
        self._specials = sorted(
            {*self._tokenizer.all_special_tokens, *self._tokenizer.get_added_vocab()},
            key=lambda token: (-len(token), token),
        )
        ends = model.generation_config.eos_token_id
        own = self._tokenizer.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = sorted({end for end in (*ends, own) if end is not None})
        pad = self._tokenizer.pad_token_id
        self._pad = pad if pad is not None else next(iter(self._ends), 0)
        self._max_tokens = model.config.max_position_embeddings

    @torch.inference_mode()
    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        """Return one reply a request, in order."""
        if self._num_threads is not None:
            # OpenMP keeps the number per calling thread, and actors call from other threads.
            torch.set_num_threads(self._num_threads)
        prompts = [self._encode(request) for request in requests]
        replies: list[ChatReply] = [
            ChatReply(
                reason=TOO_LONG,
                detail=f"{len(ids)} tokens of prompt and {request.max_tokens} of answer, the model "
                f"takes {self._max_tokens}",
            )
            for ids, request in zip(prompts, requests, strict=True)
        ]
        fitting = [
            i
            for i, (ids, request) in enumerate(zip(prompts, requests, strict=True))
            if len(ids) + request.max_tokens <= self._max_tokens
        ]
        for batch in self._batches(prompts, requests, fitting):
            answers = self._answer([prompts[i] for i in batch], [requests[i] for i in batch])
            for i, reply in zip(batch, answers, strict=True):
                replies[i] = reply
        return replies

    def _encode(self, request: ChatRequest) -> list[int]:
        messages = [
            {"role": role, "content": self._plain(content)}
            for role, content in (("system", request.system), ("user", request.user))
            if content
        ]
        if self._tokenizer.chat_template is None:
            text = "\n\n".join(message["content"] for message in messages) + "\n"
            return list(self._tokenizer(text)["input_ids"])
        text = str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _plain(self, content: str) -> str:
        """Return a text in which nothing ends the user's turn: no special token stands in it."""
        for token in self._specials:
            content = content.replace(token, " ")
        return content

    def _batches(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[ChatRequest], rows: Sequence[int]
    ) -> Iterator[list[int]]:
        """Yield rows of like length and equal settings that fit into the budget when padded."""

        def settings(i: int) -> tuple[float, float, int]:
            return requests[i].temperature, requests[i].top_p, requests[i].max_tokens

        batch: list[int] = []
        for i in sorted(rows, key=lambda i: (settings(i), len(prompts[i]), i)):
            size = (len(batch) + 1) * (len(prompts[i]) + requests[i].max_tokens)
            if batch and (size > self._token_budget or settings(i) != settings(batch[0])):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _answer(
        self, prompts: Sequence[list[int]], requests: Sequence[ChatRequest]
    ) -> list[ChatReply]:
        try:
            return self._generate(prompts, requests)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise
            torch.cuda.empty_cache()
            half = len(prompts) // 2
            log.warning("out of memory with %d requests in a batch; halving it", len(prompts))
            first = self._answer(prompts[:half], requests[:half])
            return first + self._answer(prompts[half:], requests[half:])

    def _generate(
        self, prompts: Sequence[list[int]], requests: Sequence[ChatRequest]
    ) -> list[ChatReply]:
        device, width = self._model.device, max(map(len, prompts))
        ids_BT = torch.full((len(prompts), width), self._pad, dtype=torch.long)  # noqa: N806
        mask_BT = torch.zeros_like(ids_BT)  # noqa: N806
        for row, ids in enumerate(prompts):
            ids_BT[row, width - len(ids) :] = torch.tensor(ids)
            mask_BT[row, width - len(ids) :] = 1
        max_tokens = requests[0].max_tokens
        settings = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers'
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=self._pad,
            eos_token_id=self._ends or None,
        )
        processors = LogitsProcessorList()
        if requests[0].temperature > 0:
            processors.append(_SeededSampling(requests, device))
        made = self._model.generate(
            ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            generation_config=settings,
            logits_processor=processors,
        )[:, width:].tolist()
        return [self._reply(ids, max_tokens) for ids in made]

    def _reply(self, ids: list[int], max_tokens: int) -> ChatReply:
        end = next((i for i, token in enumerate(ids) if token in self._ends), None)
        text = str(self._tokenizer.decode(ids[:end], skip_special_tokens=True))
        return ChatReply(text=text, is_cut=end is None and len(ids) >= max_tokens)


class _SeededSampling(LogitsProcessor):
    """Makes the likeliest token a draw: Gumbel noise on logits (Gumbel-max), a seed for each row.

    The largest of ``logits + noise`` is distributed as the softmax of the logits.
    """

    def __init__(self, requests: Sequence[ChatRequest], device: torch.device) -> None:
        self._temperature = requests[0].temperature
        self._top_p = TopPLogitsWarper(requests[0].top_p) if requests[0].top_p < 1 else None
        self._generators = [torch.Generator(device).manual_seed(r.seed) for r in requests]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float() / self._temperature
        if self._top_p is not None:
            logits = self._top_p(input_ids, logits)
        noise = torch.stack(
            [
                torch.empty(logits.shape[1], device=logits.device).exponential_(generator=g)
                for g in self._generators
            ]
        )
        return logits - noise.log()
