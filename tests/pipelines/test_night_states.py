"""Any order of edits, nights, crashes, rollbacks and vacuums keeps what the night promises.

The oracle needs no second embedding: a text has one vector, and answers are brute force over them.
"""

import shutil
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qbatch.lease import hold_lease
from qbatch.pipelines.reindex import PublishStep, reindex
from qbatch.pipelines.rollback import RollbackConfig, rollback
from qbatch.pipelines.vacuum import VacuumConfig, vacuum
from qbatch.release import latest_release, open_release, release_numbers
from qbatch.schema import vector_matrix
from qbatch.storage import Storage
from tests.durable_writes import DyingDriver, Killed
from tests.nights import LOOSE, Corpus, content_of, lists_of, night_config, text_of, write_queries

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(7200)]

MODEL: list[str] = []
"""The tiny model; Hypothesis makes the machine itself."""


class Nights(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.uri = tempfile.mkdtemp(prefix="nights-")
        self.corpus = Corpus(f"{self.uri}/corpus", num_files=3, per_file=8)
        self.corpus.write()
        write_queries(f"{self.uri}/queries.jsonl", 5)
        publish = PublishStep(lease_s=1, wait_s=60)
        self.config = night_config(self.uri, MODEL[0], gates=LOOSE, publish=publish)
        self.version = 0
        self.vectors: dict[str, list[float]] = {}
        self.released: dict[int, object] = {}
        self.run_night()

    def teardown(self):
        shutil.rmtree(self.uri)

    @rule(data=st.data())
    def edit(self, data):
        """Change, add or delete a document, or rename a file."""
        self.version += 1
        name = data.draw(st.sampled_from(sorted(self.corpus.files)))
        kind = data.draw(st.sampled_from(["change", "add", "delete", "rename"]))
        rows = self.corpus.files[name]
        if kind == "add":
            rows[f"new{self.version}"] = text_of(50, self.version)
        elif kind == "rename":
            self.corpus.files[f"{self.version:03d}-{name}"[:60]] = self.corpus.files.pop(name)
        elif len(rows) > 2:
            victim = data.draw(st.sampled_from(sorted(rows)))
            if kind == "delete":
                del rows[victim]
            else:
                rows[victim] = text_of(int(victim.strip("dnew")) + 1, self.version)
        self.corpus.write()

    @rule()
    def night(self):
        self.run_night()

    def run_night(self):
        made = reindex(self.config)
        if made["released"]:
            assert made["release"] not in self.released
            release = open_release(self.config.output)
            self.check_whole(release)
            self.released[release.number] = content_of(release)

    @rule(writes=st.integers(0, 60))
    def crash(self, writes):
        with pytest.MonkeyPatch.context() as patch:
            DyingDriver(patch, writes)
            try:
                made = reindex(self.config)
            except Killed:
                made = None
        newest = open_release(self.config.output)
        if newest.number not in self.released:  # it died after its last manifest, or not at all
            assert made is None or made["released"]
            self.check_whole(newest)
            self.released[newest.number] = content_of(newest)

    @precondition(lambda self: len(self.released) > 1)
    @rule(data=st.data())
    def roll_back(self, data):
        number = data.draw(st.sampled_from(sorted(self.released)))
        before = open_release(self.config.output, number)
        made = rollback(RollbackConfig(output=self.config.output, release=number))
        self.released[made["release"]] = content_of(before)

    @rule(keep=st.integers(1, 3))
    def vacuum(self, keep):
        vacuum_waiting(VacuumConfig(output=self.config.output, keep=keep, min_age_hours=0))
        kept = release_numbers(Storage(self.config.output))
        assert kept == sorted(self.released)[-keep:]
        self.released = {number: self.released[number] for number in kept}

    @invariant()
    def every_kept_release_is_as_it_was(self):
        if not hasattr(self, "released"):
            return
        for number, content in self.released.items():
            assert content_of(open_release(self.config.output, number)) == content
        newest = latest_release(Storage(self.config.output))
        assert newest is not None
        assert newest.number == max(self.released)

    def check_whole(self, release):
        """Compare a release with the corpus it was just made from."""
        table = release.open("vectors").to_table(["doc_id", "vector"])
        ids, matrix = table["doc_id"].to_pylist(), vector_matrix(table["vector"])
        documents = self.corpus.documents
        assert sorted(ids) == sorted(documents)
        for doc_id, vector in zip(ids, matrix, strict=True):
            known = self.vectors.setdefault(documents[doc_id], vector)
            np.testing.assert_allclose(vector, known, atol=1e-5)
        related = lists_of(release.open("related"))
        assert related.keys() == documents.keys()
        scores = matrix @ matrix.T
        by_id = {doc_id: row for row, doc_id in enumerate(ids)}
        for key, items in related.items():
            row = by_id[key]
            best = np.sort(np.delete(scores[row], row))[::-1][: len(items)]
            np.testing.assert_allclose([score for _, score in items], best, atol=1e-3)
            for doc_id, score in items:
                assert score == pytest.approx(float(scores[row, by_id[doc_id]]), abs=1e-3)
        answers = lists_of(release.open("answers"))
        assert answers.keys() == {f"q{i}" for i in range(5)}
        assert {doc_id for items in answers.values() for doc_id, _ in items} <= set(ids)


def vacuum_waiting(config: VacuumConfig) -> None:
    """Vacuum after the lease of a killed night has run out."""
    with hold_lease(Storage(config.output), holder="test", lease_s=1, wait_s=60):
        pass
    vacuum(config)


def test_any_order_of_events(ray_cluster, tiny_model):
    MODEL[:] = [tiny_model]
    machine = Nights.TestCase
    machine.settings = settings(
        max_examples=5, stateful_step_count=8, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    machine("runTest").runTest()
