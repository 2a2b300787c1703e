import json
import logging
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from qbatch.errors import ConfigError
from qbatch.models import backbone
from qbatch.models.rerank_scorers import YesNoScorer
from qbatch.models.rerank_tokens import CandidateGroup, CandidateTokens
from qbatch.models.reranker import Reranker, RerankerConfig
from tests import assets
from tests.models.conftest import link_tokenizer
from tests.models.scripts import random_text

YES, NO = 9_693, 2_152
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def build(path: Path, **settings) -> Reranker:
    return RerankerConfig(model_path=path, **({"dtype": "float32"} | settings)).build()


@pytest.fixture(scope="session")
def tied(make_qwen3) -> Path:
    return make_qwen3(with_head=True, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def untied(make_qwen3) -> Path:
    return make_qwen3(with_head=True, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def groups() -> list[CandidateGroup]:
    """40 queries and 1,000 candidates in all scripts, some twice, one query without any."""
    rng = np.random.default_rng(0)
    made = []
    for size in [0, *rng.multinomial(996, np.full(38, 1 / 38)), 4]:
        documents = [random_text(rng, int(n)) for n in rng.geometric(0.12, size)]
        if size > 20:
            documents[7] = documents[3]
        query = random_text(rng, int(rng.integers(1, 12)))
        made.append(CandidateGroup(query=query, documents=documents))
    return made


def model_card_log_odds(path: Path, groups: list[CandidateGroup]) -> np.ndarray:
    """Return log-odds by the procedure of the Qwen3-Reranker model card, all pairs in a row."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", split_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prefix, suffix = (tokenizer.encode(x, add_special_tokens=False) for x in (PREFIX, SUFFIX))
    bodies = [
        f"<Instruct>: {INSTRUCTION}\n<Query>: {g.query}\n<Document>: {document}"
        for g in groups
        for document in g.documents
    ]
    scores = []
    for i in range(0, len(bodies), 16):
        inputs = tokenizer(
            bodies[i : i + 16],
            padding=False,
            truncation="longest_first",
            return_attention_mask=False,
            max_length=8_192 - len(prefix) - len(suffix),
        )
        inputs["input_ids"] = [prefix + ids + suffix for ids in inputs["input_ids"]]
        inputs = tokenizer.pad(inputs, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs, logits_to_keep=1).logits[:, -1, :]
        both = torch.stack([logits[:, NO], logits[:, YES]], dim=1)
        log_probs = torch.nn.functional.log_softmax(both, dim=1)
        scores.append(log_probs[:, 1] - log_probs[:, 0])
    return torch.cat(scores).numpy()


@pytest.fixture(scope="session")
def tied_reference(tied, groups) -> np.ndarray:
    return model_card_log_odds(tied, groups)


@pytest.mark.parametrize("token_budget", [300, 1_024, 100_000])
def test_scores_are_those_of_the_model_card(tied, groups, tied_reference, token_budget):
    reranker = build(tied, token_budget=token_budget)
    assert reranker.shares_prefixes
    keys = np.concatenate(reranker.score(groups))
    assert keys.dtype == np.float32
    np.testing.assert_allclose(keys, tied_reference, atol=1e-4)
    assert reranker.stats.num_pairs == len(keys) == 1_000
    assert reranker.stats.num_saved > 0.5 * reranker.stats.num_tokens or token_budget == 300


def test_the_order_is_that_of_the_model_card(tied, groups, tied_reference):
    start = 0
    for keys in cached(tied).score(groups):
        expected = tied_reference[start : start + len(keys)]
        start += len(keys)
        order, reference = np.argsort(-keys, kind="stable"), np.argsort(-expected, kind="stable")
        # Where two documents change places, the model card itself cannot tell them apart.
        np.testing.assert_allclose(expected[order], expected[reference], atol=1e-5)


def test_without_shared_prefixes_the_scores_are_the_same(tied, groups, tied_reference, monkeypatch):
    monkeypatch.setattr(backbone.Backbone, "_agrees_on_prefixes", lambda _: False)
    reranker = build(tied)
    assert not reranker.shares_prefixes
    np.testing.assert_allclose(
        np.concatenate(reranker.score(groups[:10])), tied_reference[: count(groups[:10])], atol=1e-4
    )
    assert reranker.stats.num_saved == 0


def test_padded_the_scores_are_the_same(tied, groups, tied_reference, monkeypatch):
    monkeypatch.setattr(backbone, "_MIN_COSINE", {torch.float32: 1.1})
    reranker = build(tied)
    assert not reranker.is_packed
    np.testing.assert_allclose(
        np.concatenate(reranker.score(groups[:6])), tied_reference[: count(groups[:6])], atol=1e-4
    )
    assert reranker.stats.num_saved < 0


def count(groups: list[CandidateGroup]) -> int:
    return sum(len(g.documents) for g in groups)


def test_an_untied_head_is_read_instead_of_the_embeddings(untied, groups):
    few = groups[:8]
    keys = np.concatenate(cached(untied).score(few))
    np.testing.assert_allclose(keys, model_card_log_odds(untied, few), atol=1e-4)


def test_the_embedding_table_is_no_head_unless_tied(untied, tmp_path):
    path = copy_of(untied, tmp_path, drop="lm_head.weight")
    with pytest.raises(ConfigError, match=r"lm_head.weight is missing and tie_.* is False"):
        build(path)


def copy_of(path: Path, target: Path, drop: str) -> Path:
    weights = load_file(path / "model.safetensors")
    del weights[drop]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((path / "config.json").read_text())
    return link_tokenizer(path, target)


def test_the_classifier_conversion_scores_as_the_causal_model(untied, groups, tmp_path):
    causal = Qwen3ForCausalLM.from_pretrained(untied, dtype=torch.float32)
    config = Qwen3Config.from_pretrained(untied, num_labels=1)
    classifier = Qwen3ForSequenceClassification(config)
    classifier.model.load_state_dict(causal.model.state_dict())
    head = causal.lm_head.weight.data
    classifier.score.weight.data = (head[YES] - head[NO])[None]
    classifier.save_pretrained(tmp_path)
    reranker = build(link_tokenizer(untied, tmp_path))
    assert (reranker.spec.scorer, reranker.spec.head) == ("yes-no", "decoder-class")
    few = groups[:8]
    for keys, expected in zip(reranker.score(few), cached(untied).score(few), strict=True):
        np.testing.assert_allclose(keys, expected, atol=1e-6)


def test_scores_do_not_depend_on_what_else_is_scored(tied, groups):
    reranker = cached(tied)
    together = reranker.score(groups[:6])
    alone = [reranker.score([group])[0] for group in reversed(groups[:6])][::-1]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    again = reranker.score(groups[:6])
    assert all((a == b).all() for a, b in zip(together, again, strict=True))


def test_equal_documents_are_computed_once_and_score_the_same(tied):
    reranker = build(tied)
    (keys,) = reranker.score([CandidateGroup(query="q", documents=["a", "b", "a", "a"])])
    assert keys[0] == keys[2] == keys[3] != keys[1]
    assert (reranker.stats.num_pairs, reranker.stats.num_distinct) == (4, 2)


def test_a_poisoned_document_spoils_only_itself(make_qwen3):
    path = make_qwen3(with_head=True, tie_word_embeddings=True)
    poison = 23_811  # " hello"
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][poison] = torch.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    groups = [
        CandidateGroup(query="one", documents=["news", "hello you", "old news"]),
        CandidateGroup(query="say hello", documents=["news", "old news"]),
        CandidateGroup(query="two", documents=["news", "some other news"]),
    ]
    results = build(path).score(groups)
    assert [np.isnan(r).tolist() for r in results] == [
        [False, True, False],
        [True, True],
        [False, False],
    ]


def test_a_rejected_query_has_no_scores_and_harms_no_other(tied):
    reranker = build(tied, max_tokens=150)
    groups = [
        CandidateGroup(query="fits", documents=["one", "word " * 200]),
        CandidateGroup(query="x " * 200, documents=["one", "two", "three"]),
    ]
    fits, rejected = reranker.score(groups)
    assert np.isfinite(fits).all()
    assert np.isnan(rejected).all()
    stats = reranker.stats
    assert (stats.num_pairs, stats.num_rejected, stats.num_truncated) == (5, 3, 1)


def test_no_groups_and_no_documents_give_no_scores(tied):
    reranker = cached(tied)
    assert reranker.score([]) == []
    (nothing,) = reranker.score([CandidateGroup(query="q", documents=[])])
    assert (nothing.shape, nothing.dtype) == ((0,), np.float32)


def test_half_precision_stays_close(tied, groups, tied_reference):
    few = groups[:5]
    keys = np.concatenate(build(tied, dtype="bfloat16").score(few))
    assert np.corrcoef(keys, tied_reference[: count(few)])[0, 1] > 0.995


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_variable_length_kernel_agrees_with_the_cpu(tied, groups, tied_reference):
    reranker = build(tied, dtype="bfloat16", device="cuda")
    assert reranker.shares_prefixes
    assert np.corrcoef(np.concatenate(reranker.score(groups)), tied_reference)[0, 1] > 0.995


def test_a_pack_beyond_memory_is_halved(tied, groups, tied_reference, monkeypatch, caplog):
    reranker = build(tied, token_budget=2_000)
    whole = YesNoScorer.score

    def score(self, pack):
        if len(pack.ids) > 700:
            raise torch.OutOfMemoryError("pretended")
        return whole(self, pack)

    monkeypatch.setattr(YesNoScorer, "score", score)
    with caplog.at_level(logging.WARNING):
        keys = np.concatenate(reranker.score(groups[:5]))
    np.testing.assert_allclose(keys, tied_reference[: count(groups[:5])], atol=1e-4)
    assert "did not fit into memory" in caplog.text
    assert reranker.token_budget < 2_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [1, 2]}, "group 0 has 2 ids for lengths that add up to 1"),
        ({"ids": [151_669]}, "token ids of group 0 go from 5 to 151669"),
        ({"after": []}, "at least 1 after"),
    ],
)
def test_ids_that_do_not_fit_are_refused(tied, change, message):
    parts = {"before": [5] * 9, "after": [6], "ids": [7], "lengths": [1]} | change
    tokens = CandidateTokens(**{k: np.array(v, np.int32) for k, v in parts.items()})
    with pytest.raises(ValueError, match=message):
        cached(tied).score_tokens([tokens])


@cache
def cached(path: Path) -> Reranker:
    return build(path)


# Encoders.


def make_classifier(model: PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path)
    return link_tokenizer(assets.minilm(), path)


SHAPE = {
    "vocab_size": 30_522,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "initializer_range": 0.2,
    "num_labels": 1,
}


def tiny_classifier(kind: str) -> PreTrainedModel:
    torch.manual_seed(3)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SHAPE))
    if kind == "xlm-roberta":
        return XLMRobertaForSequenceClassification(XLMRobertaConfig(**SHAPE))
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            **{k: v for k, v in SHAPE.items() if k in {"vocab_size", "initializer_range"}},
            dim=64,
            hidden_dim=128,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=160,
            num_labels=1,
        )
    )


@pytest.mark.parametrize(
    ("kind", "is_packed"), [("bert", True), ("xlm-roberta", True), ("distilbert", False)]
)
def test_cross_encoders_score_as_sentence_transformers(tmp_path, kind, is_packed):
    path = make_classifier(tiny_classifier(kind), tmp_path)
    rng = np.random.default_rng(0)
    groups = [
        CandidateGroup(
            query=random_text(rng, 3),
            documents=[random_text(rng, int(n)) for n in rng.integers(1, 12, 15)],
        )
        for _ in range(4)
    ]
    reranker = build(path, token_budget=300)
    assert (reranker.spec.scorer, reranker.is_packed) == ("cross-encoder", is_packed)
    keys = np.concatenate(reranker.score(groups))
    other = CrossEncoder(str(path), device="cpu", activation_fn=torch.nn.Identity(), max_length=158)
    pairs = [(g.query, document) for g in groups for document in g.documents]
    np.testing.assert_allclose(keys, other.predict(pairs).ravel(), atol=1e-4)


def test_token_types_matter_and_arrive(tmp_path):
    model = tiny_classifier("bert")
    before = build(make_classifier(model, tmp_path)).score(one_group())[0]
    model.bert.embeddings.token_type_embeddings.weight.data[1, :8] += 1
    changed = tmp_path / "changed"
    changed.mkdir()
    after = build(make_classifier(model, changed)).score(one_group())[0]
    assert np.abs(before - after).min() > 1e-3


def one_group() -> list[CandidateGroup]:
    return [CandidateGroup(query="what is new?", documents=["old news", "bread and butter"])]


# Language models.


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_query_likelihood_is_that_of_a_plain_loop(tmp_path, kind):
    path = tiny_language_model(kind, tmp_path)
    rng = np.random.default_rng(1)
    groups = [
        CandidateGroup(
            query=random_text(rng, num_words),
            documents=[random_text(rng, int(n)) for n in rng.geometric(0.2, 4)],
        )
        for num_words in (1, 40)
    ]
    reranker = build(path, scorer="query-likelihood" if kind == "qwen3" else "auto")
    assert (reranker.spec.scorer, reranker.is_packed) == ("query-likelihood", True)
    expected = [plain_likelihoods(path, group) for group in groups]
    for keys, reference in zip(reranker.score(groups), expected, strict=True):
        np.testing.assert_allclose(keys, reference, atol=1e-4)


def tiny_language_model(kind: str, path: Path) -> Path:
    torch.manual_seed(4)
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config_class, model_class = classes[kind]
    shape = {k: v for k, v in SHAPE.items() if k not in {"vocab_size", "num_labels"}}
    config = config_class(
        **(shape | {"vocab_size": 151_669, "max_position_embeddings": 4_096}),
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model_class(config).save_pretrained(path)
    return link_tokenizer(assets.qwen3_tokenizer(), path)


@torch.inference_mode()
def plain_likelihoods(path: Path, group: CandidateGroup) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    scores = []
    for document in group.documents:
        parts = ["Passage:", f" {document}", "\nQuestion about the passage:", f" {group.query}"]
        encoded = [tokenizer.encode(part, add_special_tokens=False) for part in parts]
        ids = torch.tensor([sum(encoded, [])])  # noqa: RUF017 - four short lists
        log_probs = model(ids).logits[0].log_softmax(-1)
        first = ids.shape[1] - len(encoded[-1])
        own = [log_probs[i - 1, ids[0, i]] for i in range(first, ids.shape[1])]
        scores.append(float(torch.stack(own).mean()))
    return np.array(scores)


# What a checkpoint is.


@pytest.mark.parametrize(
    ("change", "scorer", "message"),
    [
        ({"architectures": ["Qwen3Model"]}, "auto", "Not a reranker in .*'Qwen3Model'"),
        ({}, "cross-encoder", r"does not fit .*\['query-likelihood', 'yes-no'\]"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto", "run its own code"),
    ],
)
def test_checkpoints_that_cannot_rerank_are_refused(tied, tmp_path, change, scorer, message):
    (tmp_path / "model.safetensors").symlink_to(tied / "model.safetensors")
    config = json.loads((tied / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=message):
        build(link_tokenizer(tied, tmp_path), scorer=scorer)


def test_a_classifier_of_two_labels_is_refused(tmp_path):
    model = BertForSequenceClassification(BertConfig(**(SHAPE | {"num_labels": 2})))
    with pytest.raises(ConfigError, match=r"number of labels in .*: 2; a reranker has 1"):
        build(make_classifier(model, tmp_path))


@pytest.mark.parametrize("name", ["max_tokens", "token_budget", "num_threads"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is out of range: 0"):
        RerankerConfig(model_path=Path(), **{name: 0})
