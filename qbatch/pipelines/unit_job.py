"""What jobs that run units through a pool of actors have in common: flags, pool and accounting."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qbatch.corpus.reasons import num_bad_rows, num_row_rejects
from qbatch.errors import BadInputError, ConfigError
from qbatch.pipelines.cluster import PoolPlan, plan_pool
from qbatch.pipelines.conservation import check_balance


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitJobConfig:
    """The flags of such a job."""

    min_actors: int | None = None
    """Smallest pool; None is 1."""
    max_actors: int | None = None
    """Largest pool; None is what the cluster has GPUs or processors for."""
    gpus_per_actor: float | None = None
    """None is 1 on a cluster with GPUs, else 0, and 0 where a server computes."""
    max_bad_fraction: float = 0.001
    """Share of bad rows above which nothing is published; what falls to a rule is not bad."""
    max_bad_files: int = 0
    """Number of unreadable objects above which nothing is published."""
    stall_timeout_s: float = 1800.0
    """Seconds without any progress after which the job ends with code 6."""
    single_writer: bool = False
    """I am the only writer here: allow a store without conditional PUT."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"max_bad_fraction is {self.max_bad_fraction}; give 0 to 1")
        if self.max_bad_files < 0:
            raise ConfigError(f"max_bad_files is {self.max_bad_files}; give 0 or more")
        if self.stall_timeout_s <= 0:
            raise ConfigError(f"stall_timeout_s is {self.stall_timeout_s}; give seconds above 0")

    def pool(self, *, needs_gpus: bool = True) -> PoolPlan:
        """Return the pool for the cluster that is joined.

        Raises:
            ConfigError: The cluster has fewer GPUs than the smallest pool needs.
        """
        gpus = self.gpus_per_actor if needs_gpus else 0.0
        return plan_pool(self.min_actors, self.max_actors, gpus)

    def check_counts(
        self,
        counts: Mapping[str, Any],
        what: str,
        *,
        rows_in: str = "rows_in",
        rows_out: str = "rows_out",
    ) -> None:
        """Refuse to publish more bad input than is allowed, and anything that does not add up.

        Args:
            counts: Of all units.
            what: See ``check_balance``, as for the others.
            rows_in: Likewise.
            rows_out: Likewise.

        Raises:
            BadInputError: Too many bad rows or objects; finished units are kept for the next run.
            IntegrityError: Rows are missing.
        """
        check_balance(counts, what, rows_in=rows_in, rows_out=rows_out)
        rejected = counts["rejected"]
        bad_files = sum(rejected.values()) - num_row_rejects(rejected)
        bad_rows = num_bad_rows(rejected)
        kept = "nothing was published, finished units are kept, and the rejects files say which"
        if bad_files > self.max_bad_files:
            raise BadInputError(
                f"{bad_files} unreadable objects ({rejected}), --max-bad-files="
                f"{self.max_bad_files} are allowed; {kept}. Mend them or allow more, and run again"
            )
        if bad_rows > self.max_bad_fraction * counts[rows_in]:
            raise BadInputError(
                f"{bad_rows} bad {what} among {counts[rows_in]} ({rejected}), a share of "
                f"--max-bad-fraction={self.max_bad_fraction:g} is allowed; {kept}. Mend them or "
                "allow more, and run again"
            )
