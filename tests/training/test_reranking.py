"""Training a reranker in this process; what it learned is what the rerank job reads."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from qbatch.errors import BadInputError, ConfigError
from qbatch.models.rerank_tokens import CandidateGroup
from qbatch.models.reranker import RerankerConfig
from qbatch.pipelines.train_reranker import TrainRerankerConfig
from qbatch.training.loop import train
from qbatch.training.losses import answer_losses, listwise_losses, two_way_losses
from qbatch.training.model_files import starting_model
from qbatch.training.pairs import PairTable
from qbatch.training.reranking import RerankingSettings
from qbatch.training.task import Start
from tests.tiny_models import write_tiny_cross_encoder
from tests.training_pairs import WORDS, note, write_pairs

SETTINGS = {
    "batch_size": (16,),
    "learning_rate": (3e-3,),
    "instruction": "find",
    "dtype": "float32",
    "keep_checkpoints": 0,
}


def config_for(pairs: Path, output: Path, start: Path, **settings) -> TrainRerankerConfig:
    given = {"pairs": (str(pairs),), "output": str(output), "init_config": str(start)}
    return TrainRerankerConfig(**given | SETTINGS | settings)


def train_here(config: TrainRerankerConfig) -> dict:
    train(replace(config.task("float32", 1), fingerprint="test"), config.settings())
    return json.loads(Path(config.output, "report.json").read_text())


def rank_first(model: Path) -> float:
    """How often a new note about the asked word is ranked above notes about three others."""
    rng = np.random.default_rng(9)
    groups = []
    for i in range(1, len(WORDS) - 2):
        documents = [note(rng, word) for word in (WORDS[0], *WORDS[i : i + 3])]
        groups.append(CandidateGroup(query=f"find {WORDS[0]}", documents=documents))
    config = RerankerConfig(model_path=model, dtype="float32", device="cpu", instruction="find")
    return float(np.mean([keys.argmax() == 0 for keys in config.build().score(groups)]))


@pytest.mark.parametrize("loss", ["pointwise", "listwise"])
def test_training_lowers_the_loss_and_ranks_the_right_note_first(tiny_start, tmp_path, loss):
    pairs = write_pairs(tmp_path / "pairs.parquet", 160, num_negatives=3, asked=WORDS[:1])
    config = config_for(pairs, tmp_path / "out", tiny_start, loss=loss, epochs=(4,))
    (tmp_path / "start").mkdir()
    start = starting_model(config.start(), "reranker", tmp_path / "start")
    assert rank_first(start) < 0.7
    report = train_here(config)
    assert report["loss_last"] < 0.3 * report["loss_first"]
    assert rank_first(tmp_path / "out") == 1
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == load_file(start / "model.safetensors").keys()
    assert "lm_head.weight" not in saved  # it is tied


def build(config: TrainRerankerConfig, path: Path):
    return config.settings().build(path, config.task("float32", 1), torch.device("cpu"))


@pytest.fixture
def small(tiny_start, tmp_path) -> tuple[TrainRerankerConfig, Path]:
    pairs = write_pairs(tmp_path / "pairs.parquet", 8, num_negatives=3)
    config = config_for(pairs, tmp_path / "out", tiny_start, batch_size=(8,))
    (tmp_path / "start").mkdir()
    return config, starting_model(config.start(), "reranker", tmp_path / "start")


def read(objective, config: TrainRerankerConfig):
    numbers = np.arange(8)
    table = PairTable.open(config.pairs[0])
    return objective.read(table.take(numbers), numbers, num_negatives=3, seed=[0])


@pytest.mark.parametrize("loss", ["pointwise", "pointwise-two-way", "listwise"])
@pytest.mark.parametrize("token_budget", [100, 100_000])
def test_gradients_are_those_of_one_pair_at_a_time(small, loss, token_budget):
    """The oracle runs each whole pair by itself through the stock model and its whole head."""
    config, start = small
    config = replace(config, loss=loss, token_budget=token_budget)
    objective = build(config, start)
    groups = read(objective, config)
    found = objective.backward(objective.network, groups, equal_passes=False)
    gradients = {n: p.grad for n, p in objective.network.named_parameters()}

    oracle = build(config, start)
    model = oracle.network.model
    model.set_attn_implementation("eager")
    answers, counts = [], [len(group.lengths) for group in groups]
    yes, no = (oracle._tokenizer._tokenizer.token_to_id(word) for word in ("yes", "no"))
    for group in groups:
        for document in np.split(group.ids, np.cumsum(group.lengths)[:-1]):
            ids = np.concatenate([group.before, document, group.after]).astype(np.int64)
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, -1]
            answers.append(logits.log_softmax(-1)[[no, yes]])
    answers = torch.stack(answers)
    is_relevant = torch.tensor([i == 0 for count in counts for i in range(count)])
    expected = {
        "pointwise": lambda: answer_losses(answers, is_relevant),
        "pointwise-two-way": lambda: two_way_losses(answers, is_relevant),
        "listwise": lambda: listwise_losses(answers, counts),
    }[loss]().mean()
    expected.backward()
    assert found == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in oracle.network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_training_scores_what_the_rerank_job_scores(small):
    config, start = small
    objective = build(config, start)
    groups = read(objective, config)
    reranker = RerankerConfig(model_path=start, dtype="float32", device="cpu").build()
    keys = np.concatenate(reranker.score_tokens(groups))
    seen = []
    objective.network.register_forward_hook(lambda module, args, output: seen.append(output))
    objective.backward(objective.network, groups, equal_passes=False)
    [answers] = seen
    log_odds = (answers[:, 1] - answers[:, 0]).detach().numpy()
    np.testing.assert_allclose(np.sort(log_odds), np.sort(keys), atol=1e-4)


def test_a_query_without_room_for_documents_is_refused(small):
    config, start = small
    row = {"query": "find " + "x " * 400, "document": "note"}
    pq.write_table(pa.Table.from_pylist([row] * 8), config.pairs[0])
    with pytest.raises(BadInputError, match="pair 0 cannot be trained on: query and prompt take"):
        read(build(config, start), config)


def test_a_classifier_is_no_start(tmp_path):
    path = write_tiny_cross_encoder(tmp_path)
    config = TrainRerankerConfig(pairs=("pairs",), output="out", model=str(path))
    with pytest.raises(ConfigError, match="scorer does not fit the model"):
        RerankingSettings(loss="pointwise").build(
            path, config.task("float32", 1), torch.device("cpu")
        )


def test_an_embedder_is_a_start_whose_embedding_table_becomes_the_head(tiny_start, tmp_path):
    start = Start(model=None, revision=None, init_config=str(tiny_start), seed=3)
    embedder, scratch = tmp_path / "embedder", tmp_path / "scratch"
    embedder.mkdir()
    scratch.mkdir()
    starting_model(start, "embedder", embedder)
    path = starting_model(
        replace(start, model=str(embedder), init_config=None), "reranker", scratch
    )
    before, after = (load_file(p / "model.safetensors") for p in (embedder, path))
    assert {f"model.{name}" for name in before} == set(after)
    assert all(torch.equal(after[f"model.{name}"], x) for name, x in before.items())
    build = RerankerConfig(model_path=path, dtype="float32", device="cpu").build
    group = CandidateGroup(query="find a", documents=["note b"])
    assert np.isfinite(build().score([group])[0]).all()
