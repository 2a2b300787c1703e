"""The one table of all benchmarks: a row for each opponent, ours against theirs."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One comparison; speeds are medians of turns taken one after the other in one run."""

    case: str
    """What is done, with which model and dtype."""
    against: str
    """Who does the same beside us."""
    unit: str
    """Of the speeds, such as ``documents/s``."""
    ours: float
    theirs: float
    ratios: tuple[float, ...]
    """Ours over theirs in each turn, above 1 where we are faster."""
    goal: float
    """The ratio that the project promises itself."""
    share: float | None = None
    """Of the speed of bare matrix products in the model's shapes, for our side."""

    @classmethod
    def of_turns(
        cls,
        seconds: Iterable[tuple[float, float]],
        amount: float,
        *,
        case: str,
        against: str,
        unit: str,
        goal: float,
    ) -> "Row":
        """Return the row of turns in which both did the same amount.

        Args:
            seconds: Ours and theirs in each turn.
            amount: Of what ``unit`` counts.
            case: See the fields.
            against: See the fields.
            unit: See the fields.
            goal: See the fields.
        """
        ours, theirs = zip(*seconds, strict=True)
        return cls(
            case=case,
            against=against,
            unit=unit,
            ours=amount / statistics.median(ours),
            theirs=amount / statistics.median(theirs),
            ratios=tuple(b / a for a, b in zip(ours, theirs, strict=True)),
            goal=goal,
        )

    @property
    def ratio(self) -> float:
        """The median of the turns."""
        return statistics.median(self.ratios)

    def to_json(self) -> dict[str, object]:
        """Return the fields, and what follows from them."""
        return asdict(self) | {"ratio": self.ratio, "reached": self.ratio >= self.goal}


def markdown(rows: Sequence[Row]) -> str:
    """Return the table as README shows it."""
    lines = [
        "| what | against | unit | ours | theirs | ratio (turns) | goal | of matmul |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f"{row.ratio:.2f} ({min(row.ratios):.2f} to {max(row.ratios):.2f})"
        share = "" if row.share is None else f"{row.share:.2f}"
        speeds = f"{_short(row.ours)} | {_short(row.theirs)}"
        line = f"| {row.case} | {row.against} | {row.unit} | {speeds} | {spread} | {row.goal:g} |"
        lines.append(f"{line} {share} |")
    return "\n".join(lines)


def _short(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
