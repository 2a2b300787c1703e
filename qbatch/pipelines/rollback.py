"""The rollback: an older release serves again, under a new number, within seconds."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

from qbatch.errors import ConfigError
from qbatch.release import roll_back
from qbatch.storage import Storage

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackConfig:
    """Let an older release serve again."""

    output: str
    """Directory of the releases: the --output of reindex.py."""
    release: int
    """Which release; status.py lists them."""
    single_writer: bool = False
    """I am the only writer here: allow a store without conditional PUT."""

    def __post_init__(self) -> None:
        if self.release < 1:
            raise ConfigError(f"release is {self.release}; give 1 or more, see status.py")


def rollback(config: RollbackConfig) -> dict[str, Any]:
    """Run the job and return its summary.

    Raises:
        NoInputError: There is no such release.
        IntegrityError: Its tables are not whole any more.
        CommitRaceLostError: A night released meanwhile.
    """
    storage = Storage(config.output, single_writer=config.single_writer)
    made = roll_back(storage, config.release, config=asdict(config))
    log.info("release %d has the content of release %d", made.number, config.release)
    return {
        "release": made.number,
        "content_of": config.release,
        "tables": {name: asdict(ref) for name, ref in made.tables.items()},
    }
