"""The generator in process against transformers one text at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qbatch.models.chat import TOO_LONG, ChatRequest
from qbatch.models.generator import Generator, GeneratorConfig, _SeededSampling


def ask(user: str, **settings) -> ChatRequest:
    defaults = {"system": "", "seed": 1, "max_tokens": 6, "temperature": 0.0, "top_p": 1.0}
    return ChatRequest(user=user, **(defaults | settings))


@pytest.fixture(scope="module")
def generator(tiny_judge) -> Generator:
    return GeneratorConfig(model_path=Path(tiny_judge), dtype="float32", token_budget=60).build()


def greedy_alone(model_path: str, prompt: str, max_tokens: int) -> str:
    """What transformers itself gives for one prompt without padding."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(max_tokens):
        with torch.inference_mode():
            best = model(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    made = ids[0, -max_tokens:]
    return tokenizer.decode(made, skip_special_tokens=True)


def test_batches_of_all_lengths_give_what_each_gives_alone(generator, tiny_judge):
    texts = ["a", "some longer words here", "b c", "x" * 30, "what is it", "yes no yes"]
    replies = generator.complete([ask(text) for text in texts])
    for text, reply in zip(texts, replies, strict=True):
        assert reply.text == greedy_alone(tiny_judge, text + "\n", 6)
        assert reply.is_cut


def test_a_sample_depends_on_its_own_seed_and_not_on_its_batch(generator):
    def sample(texts: list[str], seeds: list[int]) -> list[str]:
        requests = [
            ask(text, seed=seed, temperature=1.0, top_p=0.95, max_tokens=10)
            for text, seed in zip(texts, seeds, strict=True)
        ]
        return [reply.text for reply in generator.complete(requests)]

    alone = sample(["a b c"], [5])[0]
    together = sample(["some other", "a b c", "d", "a b c"], [9, 5, 8, 6])
    assert together[1] == alone
    assert together[3] != alone


def test_draws_have_the_chances_of_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    requests = [ask("x", seed=seed, temperature=0.5) for seed in range(4000)]
    drawn = _SeededSampling(requests, torch.device("cpu"))(torch.empty(0), logits).argmax(dim=1)
    shares = np.bincount(drawn.numpy(), minlength=4) / 4000
    wanted = torch.softmax(logits[0] / 0.5, dim=0).numpy()
    assert shares == pytest.approx(wanted, abs=0.03)
    cut = [ask("x", seed=seed, temperature=0.5, top_p=0.5) for seed in range(50)]
    drawn = _SeededSampling(cut, torch.device("cpu"))(torch.empty(0), logits[:50]).argmax(dim=1)
    assert set(drawn.tolist()) == {0}


def test_a_prompt_without_room_is_refused_and_the_others_are_answered(generator):
    replies = generator.complete([ask("x " * 2000), ask("short")])
    assert replies[0].reason == TOO_LONG
    assert "the model takes 1024" in replies[0].detail
    assert replies[1].reason is None


def test_special_tokens_in_a_passage_end_no_turn(generator):
    marked = generator._encode(ask("before <|im_end|> after"))
    assert marked == generator._encode(ask("before   after"))
