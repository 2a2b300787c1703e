import logging
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, BertModel, MPNetConfig, MPNetModel, XLMRobertaModel

from qbatch.errors import ConfigError
from qbatch.models import backbone
from qbatch.models.backbone import Backbone
from qbatch.models.devices import resolve_dtype
from qbatch.models.embedder import Embedder, EmbedderConfig
from qbatch.models.tokenization import TextTokenizer, TokenBatch
from qbatch.models.vectors import truncate_normalise
from tests import assets
from tests.models.conftest import tiny_encoder
from tests.models.scripts import random_text


def build(path: Path, **settings) -> Embedder:
    return EmbedderConfig(model_path=path, **({"dtype": "float32"} | settings)).build()


@pytest.fixture(scope="session")
def many_texts(qwen3_dir: Path) -> TokenBatch:
    """2,000 texts of 1 to 8,000 tokens in all scripts, some of them twice."""
    rng = np.random.default_rng(0)
    sizes = [0, 0, *rng.geometric(0.15, 1_960), *rng.integers(40, 200, 34), 1_500, 4_000]
    texts = [random_text(rng, int(n)) for n in sizes]
    texts += texts[1_000:1_002]
    return TextTokenizer.load(qwen3_dir, 8_000).encode(texts)


def one_by_one(path: Path, batch: TokenBatch, pooling: str) -> np.ndarray:
    """Return what transformers itself gives for one text at a time."""
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    vectors = [_vector(model, ids, pooling) for ids in split(batch)]
    return truncate_normalise(np.stack(vectors), model.config.hidden_size)


@torch.inference_mode()
def _vector(model, ids: np.ndarray, pooling: str) -> np.ndarray:
    states = model(torch.from_numpy(ids).long()[None]).last_hidden_state[0]
    return {"last": states[-1], "cls": states[0], "mean": states.mean(0)}[pooling].numpy()


def split(batch: TokenBatch) -> list[np.ndarray]:
    return np.split(batch.ids, np.cumsum(batch.lengths)[:-1])


def join(texts: list[np.ndarray]) -> TokenBatch:
    lengths = np.array([len(t) for t in texts], np.int32)
    return TokenBatch(ids=np.concatenate(texts).astype(np.int32), lengths=lengths)


def embed(embedder: Embedder, batch: TokenBatch) -> np.ndarray:
    return embedder.embed(batch.ids, batch.lengths)


def worst_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum(1).min())


@pytest.fixture(scope="session")
def reference(qwen3_dir: Path, many_texts: TokenBatch) -> np.ndarray:
    return one_by_one(qwen3_dir, many_texts, "last")


@pytest.mark.parametrize("token_budget", [64, 2_048, 100_000])
def test_packed_qwen3_equals_one_text_at_a_time(qwen3_dir, many_texts, reference, token_budget):
    assert many_texts.lengths.max() == 8_000
    assert many_texts.lengths.min() == 1
    embedder = build(qwen3_dir, token_budget=token_budget)
    assert embedder.is_packed
    assert worst_cosine(embed(embedder, many_texts), reference) >= 0.99999


def test_the_order_of_the_texts_does_not_matter(qwen3_dir, many_texts, reference):
    order = np.random.default_rng(1).permutation(len(many_texts.lengths))
    texts = split(many_texts)
    shuffled = join([texts[i] for i in order])
    assert worst_cosine(embed(build(qwen3_dir), shuffled), reference[order]) >= 0.99999


def test_padded_equals_packed(qwen3_dir, many_texts, reference, monkeypatch, caplog):
    monkeypatch.setattr(backbone, "_MIN_COSINE", {torch.float32: 1.1})
    with caplog.at_level(logging.WARNING):
        embedder = build(qwen3_dir, token_budget=2_000)
    assert [r.message for r in caplog.records if "padded" in r.message] == [
        "Qwen3Model runs padded, which is slower than packed: "
        "its hidden states differ, cosine 1.00000"
    ]
    assert not embedder.is_packed
    short = join([t for t in split(many_texts) if len(t) < 500])
    expected = reference[many_texts.lengths < 500]
    assert worst_cosine(embed(embedder, short), expected) >= 0.99999
    assert embedder.stats.num_computed > embedder.stats.num_tokens


def test_equal_lengths_are_still_causal(qwen3_dir):
    a, b = np.array([5, 6, 7, 151_643]), np.array([8, 9, 6, 151_643])
    embedder = build(qwen3_dir)
    together = embed(embedder, join([a, b]))
    alone = np.concatenate([embed(embedder, join([a])), embed(embedder, join([b]))])
    assert worst_cosine(together, alone) >= 0.99999


INSTRUCTION = np.arange(1_000, 1_019)


def test_a_common_instruction_is_computed_once_a_pack(qwen3_dir):
    rng = np.random.default_rng(0)
    tails = [rng.integers(5, 150_000, n) for n in [1, 1, 300, *rng.geometric(0.1, 200)]]
    batch = join([np.append(INSTRUCTION, tail) for tail in tails])
    embedder = build(qwen3_dir, token_budget=256)
    vectors = embed(embedder, batch)
    assert worst_cosine(vectors, one_by_one(qwen3_dir, batch, "last")) >= 0.99999
    stats, own = embedder.stats, sum(map(len, tails))
    assert stats.num_tokens == batch.lengths.sum() == own + 19 * len(tails)
    assert stats.num_computed == own + 19 * stats.num_packs
    assert stats.num_packs > 3


def test_a_long_common_beginning_does_not_fill_the_packs(qwen3_dir):
    start = np.arange(1_000, 1_100)
    batch = join([np.append(start, tail) for tail in range(5, 605)])
    embedder = build(qwen3_dir, token_budget=101)
    vectors = embed(embedder, batch)
    assert embedder.stats.num_computed <= 600 + 2 * 100
    few = join(split(batch)[:5])
    assert worst_cosine(vectors[:5], one_by_one(qwen3_dir, few, "last")) >= 0.99999


def test_a_poisoned_text_spoils_no_other_that_shares_its_beginning(make_qwen3):
    poison = 4_242
    path = make_qwen3()
    weights = load_file(path / "model.safetensors")
    weights["embed_tokens.weight"][poison] = torch.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    texts = [np.append(INSTRUCTION, tail) for tail in ([5, 6, 7], [5, poison, 7], [8, 9, 6])]
    embedder = build(path)
    vectors = embed(embedder, join(texts))
    assert embedder.stats.num_computed == 19 + 9
    assert np.isnan(vectors).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("cls", "pooling"), [(BertModel, "lasttoken"), (BertModel, "mean"), (XLMRobertaModel, "cls")]
)
def test_encoders_share_no_beginning(make_encoder, cls, pooling):
    path = make_encoder(tiny_encoder(cls), pooling)
    batch = join([np.append(INSTRUCTION, tail) for tail in ([5, 6, 7], [8], [9, 6])])
    embedder = build(path)
    expected = one_by_one(path, batch, "last" if pooling == "lasttoken" else pooling)
    assert worst_cosine(embed(embedder, batch), expected) >= 0.99999
    assert embedder.stats.num_computed == batch.lengths.sum()


def test_equal_texts_are_computed_once_and_get_equal_vectors(qwen3_dir):
    texts = [np.array([5, 6, 151_643]), np.array([7, 151_643])]
    embedder = build(qwen3_dir)
    vectors = embed(embedder, join([texts[i] for i in (0, 1, 0, 0)]))
    assert (vectors[2] == vectors[0]).all()
    assert (vectors[3] == vectors[0]).all()
    assert (embedder.stats.num_texts, embedder.stats.num_distinct) == (4, 2)
    assert (embedder.stats.num_tokens, embedder.stats.num_computed) == (5, 5)


def test_a_poisoned_text_spoils_only_itself(make_qwen3):
    poison = 4_242
    path = make_qwen3()
    weights = load_file(path / "model.safetensors")
    weights["embed_tokens.weight"][poison] = torch.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    texts = [np.array([5, 6, 7]), np.array([5, poison, 7]), np.array([8, 9, 6]), np.array([1, 2])]
    vectors = embed(build(path), join(texts))
    assert np.isnan(vectors).all(1).tolist() == [False, True, False, False]
    assert np.isfinite(vectors[[0, 2, 3]]).all()


def test_padding_does_not_leak_into_a_vector(make_encoder, monkeypatch):
    monkeypatch.setattr(backbone, "_MIN_COSINE", {torch.float32: 1.1})
    texts = [np.array([5, 6, 7, 8, 9, 10]), np.array([5, 6])]
    model = tiny_encoder()
    before = embed(build(make_encoder(model, "mean")), join(texts))
    model.get_input_embeddings().weight.data[model.config.pad_token_id] = 999.0
    after = embed(build(make_encoder(model, "mean")), join(texts))
    np.testing.assert_allclose(after, before, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("cls", [BertModel, XLMRobertaModel])
def test_packed_encoders_equal_one_text_at_a_time(make_encoder, cls, pooling):
    path = make_encoder(tiny_encoder(cls), pooling)
    rng = np.random.default_rng(0)
    batch = join([rng.integers(2, 30_522, n) for n in rng.integers(1, 150, 60)])
    embedder = build(path, token_budget=400)
    assert embedder.is_packed
    expected = one_by_one(path, batch, "last" if pooling == "lasttoken" else pooling)
    assert worst_cosine(embed(embedder, batch), expected) >= 0.99999


def test_minilm_equals_sentence_transformers():
    rng = np.random.default_rng(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs,", "Straße", "&"]
    texts = ["", *(" ".join(rng.choice(words, n)) for n in rng.integers(1, 300, 20))]
    texts += [random_text(rng, int(n)) for n in rng.integers(1, 60, 30)]
    embedder = build(assets.minilm())
    assert embedder.is_packed
    vectors = embed(embedder, TextTokenizer.load(assets.minilm()).encode(texts))
    expected = SentenceTransformer(str(assets.minilm()), device="cpu").encode(texts)
    assert worst_cosine(vectors, expected) >= 0.99999


def test_an_architecture_outside_the_attention_interface_runs_padded(make_encoder, caplog):
    torch.manual_seed(0)
    config = MPNetConfig(
        vocab_size=30_522,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=160,
    )
    path = make_encoder(MPNetModel(config), "mean")
    embedder = build(path)
    assert not embedder.is_packed
    assert "padded" not in caplog.text
    rng = np.random.default_rng(0)
    batch = join([rng.integers(2, 30_522, n) for n in rng.integers(1, 150, 30)])
    expected = one_by_one(path, batch, "mean")
    assert worst_cosine(embed(embedder, batch), expected) >= 0.99999


def test_a_sliding_window_runs_padded_with_one_warning(make_qwen3, caplog):
    path = make_qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with caplog.at_level(logging.WARNING):
        embedder = build(path)
    assert sum("sliding_window" in record.message for record in caplog.records) == 1
    rng = np.random.default_rng(0)
    batch = join([rng.integers(0, 151_643, n) for n in (1, 5, 5, 40, 17)])
    expected = one_by_one(path, batch, "last")
    assert worst_cosine(embed(embedder, batch), expected) >= 0.99999


def test_a_pack_that_does_not_fit_into_memory_is_halved(qwen3_dir, monkeypatch, caplog):
    rng = np.random.default_rng(0)
    batch = join([rng.integers(0, 151_643, n) for n in rng.integers(1, 60, 40)])
    expected = embed(build(qwen3_dir), batch)
    embedder = build(qwen3_dir)
    whole = Backbone.pool

    def pool(self, ids, positions, lengths):
        if len(ids) > 200:
            raise torch.OutOfMemoryError("pretended")
        return whole(self, ids, positions, lengths)

    monkeypatch.setattr(Backbone, "pool", pool)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(embed(embedder, batch), expected, atol=1e-5)
    assert "did not fit into memory" in caplog.text
    assert embedder.token_budget <= 400
    with pytest.raises(torch.OutOfMemoryError, match="pretended"):
        embed(embedder, join([np.arange(201)]))


def test_half_precision_stays_close(qwen3_dir, many_texts, reference):
    short = join(split(many_texts)[:300])
    vectors = embed(build(qwen3_dir, dtype="bfloat16"), short)
    assert vectors.dtype == np.float32
    assert worst_cosine(vectors, reference[:300]) >= 0.98
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_dim_slices_before_it_normalises(qwen3_dir, many_texts, reference):
    short = join(split(many_texts)[:50])
    vectors = embed(build(qwen3_dir, dim=32), short)
    np.testing.assert_allclose(vectors, truncate_normalise(reference[:50], 32), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_both_forms_of_weight_names_load_and_the_head_is_left_out(make_qwen3, tmp_path):
    with_prefix = make_qwen3(with_head=True, tie_word_embeddings=False)
    weights = load_file(with_prefix / "model.safetensors")
    assert "lm_head.weight" in weights
    bare = make_qwen3()
    renamed = {k.removeprefix("model."): v for k, v in weights.items() if k != "lm_head.weight"}
    assert renamed.keys() == load_file(bare / "model.safetensors").keys()
    save_file(renamed, bare / "model.safetensors", metadata={"format": "pt"})
    batch = join([np.array([5, 6, 151_643]), np.array([7, 151_643])])
    np.testing.assert_array_equal(embed(build(with_prefix), batch), embed(build(bare), batch))


def test_missing_weights_are_refused_instead_of_made_up(make_qwen3):
    path = make_qwen3()
    weights = load_file(path / "model.safetensors")
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"Weights are missing .*layers\.1\.mlp\.up_proj"):
        build(path)


@pytest.mark.parametrize(
    ("lengths", "ids", "message"),
    [
        ([2], [1], "1 ids were given for lengths that add up to 2"),
        ([1, 0], [1], "texts have 0 to 1 tokens"),
        ([1], [151_669], "token ids go from 151669 .* has 151669 rows"),
        ([1], [-1], "token ids go from -1"),
    ],
)
def test_ids_that_do_not_fit_are_refused(qwen3_dir, lengths, ids, message):
    with pytest.raises(ValueError, match=message):
        cached_embedder(qwen3_dir).embed(np.array(ids, np.int32), np.array(lengths, np.int32))


def test_no_texts_give_no_vectors(qwen3_dir):
    nothing = np.empty(0, np.int32)
    assert cached_embedder(qwen3_dir).embed(nothing, nothing).shape == (0, 64)


@cache
def cached_embedder(path: Path) -> Embedder:
    return build(path)


@pytest.mark.parametrize("name", ["dim", "token_budget", "num_threads"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is out of range: 0"):
        EmbedderConfig(model_path=Path(), **{name: 0})


def test_more_dims_than_the_model_has_are_refused(qwen3_dir):
    with pytest.raises(ConfigError, match=r"dim is out of range: 65; .* gives 1 to 64"):
        build(qwen3_dir, dim=65)


def test_dtypes_are_resolved_for_the_processor(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve_dtype("float16", cpu) == "float16"
    for features, expected in [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"bf16": True}, "bfloat16"),
        ({"avx2": True, "avx512_bf16": False}, "float32"),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert resolve_dtype("auto", cpu) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_variable_length_kernel_agrees_with_the_cpu(qwen3_dir, many_texts, reference):
    embedder = build(qwen3_dir, dtype="bfloat16", device="cuda")
    assert embedder.is_packed
    assert worst_cosine(embed(embedder, many_texts), reference) >= 0.98


def test_the_number_of_threads_holds_in_whatever_thread_calls(qwen3_dir):
    embedder = EmbedderConfig(model_path=qwen3_dir, dtype="float32", num_threads=3).build()
    ids, lengths = np.array([5, 151643], np.int32), np.array([2], np.int32)

    def threads_after_embedding() -> int:
        torch.set_num_threads(1)
        embedder.embed(ids, lengths)
        return torch.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(threads_after_embedding).result() == 3
    torch.set_num_threads(1)
