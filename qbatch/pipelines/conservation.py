"""What goes in comes out, or is accounted for; checked for every unit and before every publish."""

from collections.abc import Mapping
from typing import Any

from qbatch.corpus.reasons import num_row_rejects
from qbatch.errors import IntegrityError


def check_balance(
    counts: Mapping[str, Any], what: str, *, rows_in: str = "rows_in", rows_out: str = "rows_out"
) -> None:
    """Raise IntegrityError unless every row that was read came out, was rejected or dropped.

    Args:
        counts: Of a unit or of all; ``rejected`` by reason, ``dropped`` by rule where rules drop.
        what: What a row is, for messages.
        rows_in: The name under which rows that were read are counted.
        rows_out: That of rows that something came of.
    """
    num_rejected = num_row_rejects(counts["rejected"])
    num_dropped = sum(counts.get("dropped", {}).values())
    if counts[rows_in] != counts[rows_out] + num_rejected + num_dropped:
        raise IntegrityError(
            f"{counts[rows_in]} {what} in, but {counts[rows_out]} out, {num_rejected} rejected "
            f"and {num_dropped} dropped; nothing was published. This is a bug: report it with the "
            "input"
        )
