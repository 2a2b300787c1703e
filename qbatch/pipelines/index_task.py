"""What every process of an index build needs to know."""

from dataclasses import asdict, dataclass
from typing import Any

from qbatch.index.columns import VectorColumn
from qbatch.manifest import Generation, fingerprint_id, read_verified
from qbatch.schema import SCHEMA_VERSION
from qbatch.storage import Storage
from qbatch.tables import PublishedTable

SIDECAR_COLUMNS = ("doc_id", "passage_id", "content_hash")
"""What every sidecar keeps: who a row is, and what it says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """The result of training, kept for the life of an index: the template and its probes."""

    factory: str
    reason: str
    """Why this factory."""
    requested: str
    """The factory asked for, perhaps "auto"."""
    template: dict[str, Any]
    """FILES entry of the empty, trained index."""
    probes: dict[str, Any]
    """FILES entry of the vectors that recall is measured with."""
    seconds: float
    """Of reading the sample, choosing and training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexTask:
    """The settings of a build that its stages share; it travels, indexes do not."""

    output: str
    vectors: str
    generation: Generation
    """Of the vectors table."""
    column: VectorColumn
    columns: tuple[str, ...]
    """What a sidecar keeps of the vectors table."""
    target_recall: float
    training: Training
    num_threads: int = 1
    """Of FAISS in one task."""

    @property
    def shard_fingerprint(self) -> str:
        """Id of everything but its vectors that changes a shard's files."""
        decides = {
            "schema_version": SCHEMA_VERSION,
            "embedding": dict(self.generation.fingerprint),
            "column": asdict(self.column),
            "columns": self.columns,
            "template": self.training.template["sha256"],
            "probes": self.training.probes["sha256"],
            "target_recall": self.target_recall,
        }
        return fingerprint_id(decides)

    def table(self) -> PublishedTable:
        """Return the vectors table at the generation of the build."""
        return PublishedTable(Storage(self.vectors), self.generation)

    def read_training_file(self, entry: dict[str, Any]) -> bytes:
        """Return the checked content of the template or of the probes."""
        content: bytes = read_verified(Storage(self.output), entry).to_pybytes()
        return content
