import hashlib
import json
import shutil
from pathlib import Path

import pytest

from qbatch.errors import ConfigError
from qbatch.models.hub import resolve_model
from qbatch.models.loading import load_spec, weights_sha256
from tests import assets
from tests.tiny_models import write_modules


@pytest.fixture
def model_dir(qwen3_dir: Path, tmp_path: Path) -> Path:
    """A bare Qwen3 checkpoint that a test may spoil."""
    path = tmp_path / "model"
    shutil.copytree(qwen3_dir, path, symlinks=True)
    return path


def edit_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.unlink(missing_ok=True)  # it may be a link to a shared file
    file.write_text(json.dumps(content | changes))


def test_a_bare_qwen3_checkpoint_is_an_embedding_model(qwen3_dir):
    spec = load_spec(qwen3_dir)
    assert (spec.architecture, spec.pooling, spec.normalize) == ("qwen3", "last", True)
    assert (spec.hidden_dim, spec.vocab_rows, spec.max_tokens) == (64, 151_669, 32_768)
    assert spec.prompts == {}
    tokenizer = (assets.qwen3_tokenizer() / "tokenizer.json").read_bytes()
    assert spec.tokenizer_sha256 == hashlib.sha256(tokenizer).hexdigest()


def test_minilm_is_read_as_sentence_transformers_reads_it():
    spec = load_spec(assets.minilm())
    assert (spec.architecture, spec.pooling, spec.normalize) == ("bert", "mean", True)
    assert (spec.hidden_dim, spec.vocab_rows, spec.max_tokens) == (384, 30_522, 256)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}, "mean"),
        ({"embedding_dimension": 64, "pooling_mode": "lasttoken", "include_prompt": True}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({}, "mean"),
    ],
)
def test_old_and_new_pooling_configs(model_dir, config, pooling):
    write_modules(model_dir, config)
    assert load_spec(model_dir).pooling == pooling


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode": "max"},
        {"pooling_mode": ["mean", "cls"]},
        {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
        {"pooling_mode": "mean", "include_prompt": False},
    ],
)
def test_other_poolings_are_refused(model_dir, config):
    write_modules(model_dir, config)
    with pytest.raises(ConfigError, match=r"Unsupported pooling in .*1_Pooling"):
        load_spec(model_dir)


def test_a_further_module_is_refused(model_dir):
    write_modules(model_dir, {"pooling_mode": "mean"}, names=("Dense", "Normalize"))
    with pytest.raises(ConfigError, match=r"Unsupported modules in .*models\.Dense"):
        load_spec(model_dir)


def test_a_module_from_the_model_itself_is_refused(model_dir):
    write_modules(model_dir, {"pooling_mode": "mean"})
    modules = json.loads((model_dir / "modules.json").read_text())
    modules[0]["type"] = "modeling.Transformer"
    (model_dir / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match=r"modeling\.Transformer"):
        load_spec(model_dir)


def test_pooling_is_not_guessed_for_other_architectures(model_dir):
    edit_json(model_dir / "config.json", model_type="bert")
    with pytest.raises(ConfigError, match=r"No modules.json in .*'bert'"):
        load_spec(model_dir)


def test_settings_under_other_names_are_found(model_dir):
    config = {"model_type": "distilbert", "dim": 48, "max_position_embeddings": 128}
    (model_dir / "config.json").write_text(json.dumps(config))
    write_modules(model_dir, {"pooling_mode": "mean"})
    spec = load_spec(model_dir)
    assert (spec.hidden_dim, spec.max_tokens, spec.vocab_rows) == (48, 128, 30_522)


def test_positions_taken_by_padding_shorten_the_longest_text(model_dir):
    config = {"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    (model_dir / "config.json").write_text(json.dumps(config))
    write_modules(model_dir, {"pooling_mode": "mean"})
    assert load_spec(model_dir).max_tokens == 512


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("mystery", "Unknown architecture .*'mystery'"), ("t5", "'t5' has an encoder and a decoder")],
)
def test_architectures_we_cannot_run_are_refused(model_dir, model_type, message):
    (model_dir / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ConfigError, match=message):
        load_spec(model_dir)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_with_its_own_code_is_refused(model_dir, file):
    edit_json(model_dir / file, auto_map={"AutoModel": "modeling.Evil"})
    with pytest.raises(ConfigError, match=r"run its own code: auto_map .*modeling\.Evil"):
        load_spec(model_dir)


def test_pickled_weights_are_refused(model_dir):
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"No safetensors .*pytorch_model.bin.*Convert them"):
        load_spec(model_dir)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(model_dir, file):
    (model_dir / file).unlink()
    with pytest.raises(ConfigError, match=f"A model file is missing: .*{file}"):
        load_spec(model_dir)


def test_a_damaged_file_is_named(model_dir):
    (model_dir / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"not JSON: .*config\.json"):
        load_spec(model_dir)


@pytest.mark.parametrize(
    ("similarity", "modules", "normalize"),
    [(None, (), True), ("cosine", (), True), ("dot", (), False), ("dot", ("Normalize",), True)],
)
def test_vectors_are_normalised_unless_made_for_the_inner_product(
    model_dir, similarity, modules, normalize
):
    write_modules(model_dir, {"pooling_mode": "mean"}, names=modules)
    edit_json(model_dir / "config_sentence_transformers.json", similarity_fn_name=similarity)
    assert load_spec(model_dir).normalize is normalize


def test_a_distance_is_refused(model_dir):
    edit_json(model_dir / "config_sentence_transformers.json", similarity_fn_name="euclidean")
    with pytest.raises(ConfigError, match="Unsupported similarity: 'euclidean'"):
        load_spec(model_dir)


def test_stored_prompts_and_the_default_prompt(model_dir):
    settings = {"prompts": {"query": "q: ", "passage": "p: "}, "default_prompt_name": "passage"}
    edit_json(model_dir / "config_sentence_transformers.json", **settings)
    assert load_spec(model_dir).prompts == {"query": "q: ", "passage": "p: ", "document": "p: "}


def test_the_smallest_length_limit_counts(model_dir):
    edit_json(model_dir / "tokenizer_config.json", model_max_length=8192)
    assert load_spec(model_dir).max_tokens == 8192
    edit_json(model_dir / "sentence_bert_config.json", max_seq_length=512)
    assert load_spec(model_dir).max_tokens == 512


def test_lowercasing_before_the_tokenizer_is_refused(model_dir):
    edit_json(model_dir / "sentence_bert_config.json", do_lower_case=True)
    with pytest.raises(ConfigError, match="Unsupported do_lower_case"):
        load_spec(model_dir)


def test_the_weights_hash_follows_the_bytes(model_dir):
    before = weights_sha256(model_dir)
    assert before == weights_sha256(model_dir)
    with (model_dir / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last[0] ^ 1]))
    assert weights_sha256(model_dir) != before


def test_a_directory_is_its_own_resolution(qwen3_dir):
    assert resolve_model(str(qwen3_dir)) == qwen3_dir


@pytest.mark.parametrize("model", ["./no/such/directory", "someone/some-model"])
def test_an_unpinned_or_missing_model_is_refused(model):
    with pytest.raises(ConfigError, match=f"no pinned hub model: '{model}'.*Qwen3-Embedding-0.6B"):
        resolve_model(model)


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="did not deliver 'someone/some-model' at revision 'abc'"):
        resolve_model("someone/some-model", "abc")
