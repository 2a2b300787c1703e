"""Training an embedder in this process: it learns, and any way of computing it is the same."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize
from transformers import AutoModel

from qbatch.errors import ConfigError, QualityGateError
from qbatch.models.embedder import EmbedderConfig
from qbatch.models.loading import load_spec
from qbatch.models.tokenization import TextTokenizer
from qbatch.pipelines.train_embedder import TrainEmbedderConfig
from qbatch.storage import Storage
from qbatch.training.checkpoints import complete_steps, model_state
from qbatch.training.loop import train
from qbatch.training.losses import ContrastiveBatch, contrastive_losses
from qbatch.training.model_files import starting_model
from qbatch.training.networks import without_adapters
from qbatch.training.pairs import PairTable
from tests.tiny_models import write_tiny_encoder
from tests.training_pairs import WORDS, note, write_pairs

SETTINGS = {
    "batch_size": (16,),
    "learning_rate": (3e-3,),
    "instruction": "find",
    "dtype": "float32",
    "temperature": 0.1,
    "checkpoint_every": 1000,
    "keep_checkpoints": 1,
}


def config_for(
    pairs: Path | tuple[Path, ...], output: Path, start: Path, **settings
) -> TrainEmbedderConfig:
    tables = pairs if isinstance(pairs, tuple) else (pairs,)
    given = {"pairs": tuple(map(str, tables)), "output": str(output), "init_config": str(start)}
    return TrainEmbedderConfig(**given | SETTINGS | settings)


def train_here(config: TrainEmbedderConfig) -> dict:
    train(replace(config.task("float32", 1), fingerprint="test"), config.settings())
    return json.loads(Path(config.output, "report.json").read_text())


def embed(model: Path, texts: list[str], **settings) -> np.ndarray:
    tokens = TextTokenizer.load(model).encode(texts)
    config = EmbedderConfig(model_path=model, dtype="float32", device="cpu", **settings)
    return config.build().embed(tokens.ids, tokens.lengths)


def retrieved_first(model: Path, **settings) -> float:
    """How often the query for a word finds a new note about it among notes about all words."""
    rng = np.random.default_rng(9)
    prompt = load_spec(model).prompts.get("query", "Instruct: find\nQuery:")
    queries = embed(model, [f"{prompt}find {word}" for word in WORDS], **settings)
    documents = embed(model, [note(rng, word) for word in WORDS], **settings)
    return float(np.mean((queries @ documents.T).argmax(1) == np.arange(len(WORDS))))


@pytest.fixture(scope="module")
def trained(tiny_start, tmp_path_factory) -> Path:
    """A Matryoshka embedder trained from random weights in two stages."""
    root = tmp_path_factory.mktemp("trained")
    weak = write_pairs(root / "weak.parquet", 160, num_negatives=0)
    labelled = write_pairs(root / "labelled.parquet", 80, seed=1)
    config = config_for(
        (weak, labelled),
        root / "out",
        tiny_start,
        epochs=(5, 2),
        learning_rate=(3e-3, 1e-3),
        dims=(32, 8),
    )
    train_here(config)
    return root / "out"


def test_training_lowers_the_loss_and_finds_the_right_note(trained, tiny_start, tmp_path):
    report = json.loads((trained / "report.json").read_text())
    losses = [point["loss"] for point in report["curve"] if point["stage"] == 0]
    assert len(losses) == 50
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    config = config_for(tmp_path, tmp_path, tiny_start)
    assert retrieved_first(starting_model(config.start(), "embedder", tmp_path)) < 0.5
    assert retrieved_first(trained) > 0.9
    assert retrieved_first(trained, dim=8) > 0.8


def test_stages_have_their_own_rate_and_warm_up(trained):
    report = json.loads((trained / "report.json").read_text())
    rates = [[p["learning_rate"] for p in report["curve"] if p["stage"] == i] for i in (0, 1)]
    assert [len(r) for r in rates] == [50, 10]
    assert [max(r) for r in rates] == [3e-3, 1e-3]
    assert rates[0][0] < rates[0][2]
    assert rates[0][-1] < 1e-4
    assert [stage["rows"] for stage in report["stages"]] == [160, 80]


def test_our_embedder_and_sentence_transformers_read_the_same_model(trained):
    spec = load_spec(trained)
    assert spec.prompts["query"] == "Instruct: find\nQuery:"
    model = SentenceTransformer(str(trained), device="cpu")
    texts = ["old note about apple red", "rocket", "", "big " * 100]
    theirs = model.encode(texts, normalize_embeddings=False)
    assert (embed(trained, texts) * theirs).sum(1).min() > 0.99999
    query = "find apple"
    ours = embed(trained, [spec.prompts["query"] + query])
    assert float((ours * model.encode([query], prompt_name="query")).sum()) > 0.99999
    config = json.loads((trained / "config.json").read_text())
    assert config["matryoshka_dimensions"] == [8, 32]


def test_the_last_checkpoint_is_the_model_and_resume_points_are_gone(trained):
    [step] = complete_steps(Storage(str(trained)), "checkpoints", "test")
    checkpoint = trained / "checkpoints" / f"step-{step:08d}"
    assert step == 60
    for name in ("model.safetensors", "tokenizer.json", "modules.json"):
        assert (checkpoint / name).read_bytes() == (trained / name).read_bytes()
    assert list((trained / "resume").rglob("*.*")) == []
    assert list(trained.glob(".partial-*")) == []


class Small:
    """Eight pairs and a start, ready for single steps."""

    def __init__(self, tiny_start: Path, root: Path, **settings) -> None:
        pairs = write_pairs(root / "pairs.parquet", 8, num_negatives=3)
        self.config = config_for(pairs, root / "out", tiny_start, batch_size=(8,), **settings)
        (root / "start").mkdir()
        self.start = starting_model(self.config.start(), "embedder", root / "start")

    def objective(self, **settings):
        config = replace(self.config, **settings)
        task = config.task("float32", 1)
        return config.settings().build(self.start, task, torch.device("cpu"))

    def batch(self, objective):
        numbers = np.arange(8)
        rows = PairTable.open(self.config.pairs[0]).take(numbers)
        return objective.read(rows, numbers, num_negatives=3, seed=[0])


@pytest.fixture
def small(tiny_start, tmp_path) -> Small:
    return Small(tiny_start, tmp_path)


@pytest.mark.parametrize("token_budget", [1, 100, 100_000])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_are_those_of_the_stock_model_without_packs_or_cache(
    small, token_budget, gradient_checkpointing
):
    objective = small.objective(
        token_budget=token_budget, gradient_checkpointing=gradient_checkpointing
    )
    batch = small.batch(objective)
    found = objective.backward(objective.network, batch, equal_passes=False)

    model = AutoModel.from_pretrained(small.start, attn_implementation="eager")
    texts = np.split(batch.ids.astype(np.int64), np.cumsum(batch.lengths)[:-1])
    vectors = torch.stack(
        [model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0, -1] for ids in texts]
    )
    contrastive = ContrastiveBatch(
        vectors=normalize(vectors, dim=-1).view(8, 5, -1),
        keys=torch.from_numpy(batch.keys),
        present=torch.from_numpy(batch.present),
    )
    loss = small.config.settings().loss
    expected = contrastive_losses(contrastive, slice(None), loss).mean()
    expected.backward()
    assert found == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        gradient = objective.network.model.get_parameter(name).grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4)


def test_training_embeds_as_the_embed_job_does(small):
    objective = small.objective()
    batch = small.batch(objective)
    seen = []
    objective.network.register_forward_hook(lambda module, args, output: seen.append(output))
    objective.backward(objective.network, batch, equal_passes=False)
    ours = normalize(seen[0].detach(), dim=-1).numpy()
    config = EmbedderConfig(model_path=small.start, dtype="float32", device="cpu")
    theirs = config.build().embed(batch.ids, batch.lengths)
    cosines = (ours @ theirs.T).max(1)
    assert cosines.min() > 1 - 1e-4


def test_adapters_are_written_as_peft_would_merge_them(small):
    """peft's own merge of the same adapters is the oracle."""
    objective = small.objective(model=str(small.start), init_config=None, lora_rank=4, lora_alpha=8)
    network = objective.network
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    torch.manual_seed(0)
    adapters = {}
    for name, parameter in network.named_parameters():
        if name in trained:
            parameter.data.normal_(0, 0.1)
            adapters[name.removeprefix("model.")] = parameter.data
    folder = small.start.parent / "saved"
    folder.mkdir()
    objective.save(folder, without_adapters(model_state(network), objective._task.lora))
    saved = load_file(folder / "model.safetensors")

    base = AutoModel.from_pretrained(small.start)
    wrapped = get_peft_model(base, PeftConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, tensor in adapters.items():
        wrapped.base_model.model.get_parameter(name).data.copy_(tensor)
    assert isinstance(wrapped, PeftModel)
    merged = wrapped.merge_and_unload().state_dict()
    assert saved.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(saved[name], tensor)


def test_adapters_learn_and_leave_the_rest_alone(trained, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.parquet", 32, seed=5)
    start = tmp_path / "start"
    shutil.copytree(trained, start, ignore=shutil.ignore_patterns("checkpoints"))
    config = config_for(
        pairs, tmp_path / "out", start, model=str(start), init_config=None, lora_rank=2,
        lora_dropout=0.1,
    )  # fmt: skip
    train_here(config)
    before, after = (load_file(path / "model.safetensors") for path in (start, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith("proj.weight") for name in changed)
    assert embed(tmp_path / "out", ["apple"]).shape == (1, 32)


class KilledError(Exception):
    """Stands for a SIGKILL inside a test."""


@pytest.mark.parametrize(("step", "lora_rank"), [(3, 0), (5, 0), (5, 2), (8, 0)])
def test_an_interrupted_run_ends_with_the_same_bytes(
    tiny_start, trained, tmp_path, monkeypatch, step, lora_rank
):
    """Stopped after a step of either stage, with dropout, and run again."""
    pairs = tuple(write_pairs(tmp_path / f"{i}.parquet", 48, seed=i) for i in (0, 1))
    settings = {"init_config": str(tiny_start)}
    if lora_rank:
        start = tmp_path / "start"
        shutil.copytree(trained, start, ignore=shutil.ignore_patterns("checkpoints"))
        settings = {"model": str(start), "init_config": None, "lora_rank": 2, "lora_dropout": 0.3}
    config = config_for(
        pairs, tmp_path / "whole", tiny_start, epochs=(1, 2),
        checkpoint_every=2, keep_checkpoints=2, **settings,
    )  # fmt: skip
    train_here(config)
    cut = replace(config, output=str(tmp_path / "cut"))
    real = torch.optim.AdamW.step
    done = 0

    def stop_after(self, *args, **kwargs):
        nonlocal done
        if done == step:
            raise KilledError
        done += 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", stop_after)
    with pytest.raises(KilledError):
        train_here(cut)
    monkeypatch.undo()
    report = train_here(cut)
    assert report["resumed_from_step"] == {3: 3, 5: 4, 8: 8}[step]
    for name in ("model.safetensors", "checkpoints/step-00000008/model.safetensors"):
        whole, again = (tmp_path / side / name for side in ("whole", "cut"))
        assert whole.read_bytes() == again.read_bytes()
    whole = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["curve"] == whole["curve"]
    assert report["checkpoints"] == whole["checkpoints"]


def test_weights_may_be_written_in_another_dtype(tiny_start, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.parquet", 16)
    train_here(config_for(pairs, tmp_path / "out", tiny_start, save_dtype="float16"))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    assert np.isfinite(embed(tmp_path / "out", ["apple"])).all()


def test_an_encoder_is_trained_too(tmp_path):
    start = write_tiny_encoder(tmp_path / "start")
    pairs = write_pairs(tmp_path / "pairs.parquet", 32)
    config = config_for(
        pairs, tmp_path / "out", start, model=str(start), init_config=None, instruction=None
    )
    train_here(config)
    spec = load_spec(tmp_path / "out")
    assert (spec.pooling, spec.architecture) == ("mean", "bert")
    texts = ["old note about apple", "rocket"]
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts)
    ours = embed(tmp_path / "out", texts)
    assert (normalize(torch.from_numpy(theirs)).numpy() * ours).sum(1).min() > 0.99999
    assert not np.allclose(ours, embed(start, texts), atol=1e-3)


def test_a_diverging_run_says_so(tiny_start, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.parquet", 64)
    config = config_for(pairs, tmp_path / "out", tiny_start, learning_rate=(1e30,))
    with pytest.raises(
        QualityGateError, match=r"training diverged in step \d: loss \S+ gradient norm nan"
    ):
        train_here(config)


def test_widths_beyond_the_model_are_refused(small):
    with pytest.raises(ConfigError, match="dims has 64, the model"):
        small.objective(dims=(64, 8))
