import datasets
import pytest

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.reading import read_unit
from qbatch.corpus.units import plan_units
from qbatch.errors import ConfigError, NoInputError, SourceChangedError

COLUMNS = {
    "doc_id": [str(i) for i in range(1000)],
    "text": [f"text {i} " * 20 for i in range(1000)],
    "year": list(range(1000)),
}


def save(path, **changes) -> None:
    datasets.Dataset.from_dict({**COLUMNS, **changes}).save_to_disk(path)


@pytest.mark.parametrize("unit_bytes", [10_000, 2**24])
def test_a_saved_dataset_is_recognised_and_cut_by_rows(tmp_path, read_corpus, unit_bytes):
    save(tmp_path / "saved")
    corpus = read_corpus(tmp_path / "saved", keep_columns=("year",), unit_bytes=unit_bytes)
    assert (len(corpus.units) > 10) == (unit_bytes < 2**24)
    assert corpus.column("doc_id") == COLUMNS["doc_id"]
    assert corpus.column("text") == COLUMNS["text"]
    assert corpus.column("year") == corpus.column("row") == COLUMNS["year"]


def test_a_shuffled_selection_is_read_in_its_order(tmp_path, read_corpus):
    whole = datasets.Dataset.from_dict(COLUMNS)
    whole.shuffle(seed=1).select(range(10)).save_to_disk(tmp_path / "saved")
    corpus = read_corpus(tmp_path / "saved", keep_columns=("year",))
    assert corpus.column("doc_id") == [str(year) for year in corpus.column("year")]
    assert len(corpus.documents) == 10


def test_the_split_of_a_dataset_dict(tmp_path, read_corpus):
    splits = {"train": {"text": ["a"]}, "test": {"text": ["b", None]}}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}
    ).save_to_disk(tmp_path / "saved")
    assert read_corpus(tmp_path / "saved").column("text") == ["a"]
    corpus = read_corpus(tmp_path / "saved", hf_split="test")
    assert corpus.column("text") == ["b"]
    assert corpus.reasons() == [(1, "null_text")]
    with pytest.raises(ConfigError, match=r"has no split 'dev'; it has \['test', 'train'\]"):
        list(plan_units(CorpusConfig(input=str(tmp_path / "saved"), hf_split="dev")))


@pytest.mark.parametrize(
    ("text", "reason"), [([5] * 1000, "text_column_type"), ([["x"]] * 1000, "text_column_type")]
)
def test_a_text_column_of_another_type(tmp_path, read_corpus, text, reason):
    save(tmp_path / "saved", text=text)
    assert read_corpus(tmp_path / "saved").reasons() == [(None, reason)]


def test_a_replaced_dataset_is_noticed(tmp_path):
    save(tmp_path / "saved")
    config = CorpusConfig(input=str(tmp_path / "saved"))
    (unit,) = plan_units(config)
    save(tmp_path / "saved", text=["other"] * 1000)
    with pytest.raises(SourceChangedError, match="now has 1000 rows, fingerprint"):
        read_unit(unit, config)


def test_no_dataset_is_no_input(tmp_path):
    with pytest.raises(NoInputError, match="no saved dataset at"):
        list(plan_units(CorpusConfig(input=str(tmp_path), format="hf")))
