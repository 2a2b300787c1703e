"""Reading a corpus the way a job does: plan, send every unit through JSON, read it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from qbatch.corpus.config import CorpusConfig
from qbatch.corpus.reading import read_unit
from qbatch.corpus.units import Unit, plan_units
from tests.unit_rows import check_invariants

# Time limits of single examples say more about the load of the machine than about the code.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@dataclass
class Corpus:
    """Everything that all units of a corpus gave."""

    units: list[Unit]
    documents: list[dict[str, Any]]
    rejects: list[dict[str, Any]]
    counts: Counter[str]
    rows_in: int

    def column(self, name: str) -> list[Any]:
        return [document[name] for document in self.documents]

    def reasons(self) -> list[tuple[int | None, str]]:
        return [(reject["row"], reject["reason"]) for reject in self.rejects]


@pytest.fixture
def read_corpus() -> Callable[..., Corpus]:
    def read(path: Path | str, **settings: Any) -> Corpus:
        config = CorpusConfig(input=str(path), **settings)
        units = [Unit.from_json(unit.to_json()) for unit in plan_units(config)]
        corpus = Corpus(units, [], [], Counter(), 0)
        for unit in units:
            rows = read_unit(unit, config)
            check_invariants(rows, config)
            corpus.documents += rows.documents.to_pylist()
            corpus.rejects += rows.rejects.to_pylist()
            corpus.counts += Counter(rows.counts)
            corpus.rows_in += rows.rows_in
        return corpus

    return read
