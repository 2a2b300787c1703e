"""What a run over a whole collection would take: units, requests, bytes, GPU-hours and money.

Arithmetic over figures that were measured elsewhere: tokens a second of a GPU by ``--dry-run`` or a
report, utilisation by ``tests/benchmarks/simulate_pool.py``, planning and publishing by
``tests/benchmarks/scale_plan.py``. Prices are those of the big clouds' lists; give yours.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any

from qbatch.errors import ConfigError

_LISTED_PER_REQUEST = 1000
_BYTES_PER_ROW = 120
"""Of a vectors file besides the vector: ids, places, hash, compressed."""

_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class ForecastConfig:
    """Predict an embedding run from measured figures."""

    documents: int
    """How many."""
    tokens_per_s: float
    """Of one GPU, with real texts of this kind."""
    bytes_per_document: float = 1000.0
    """Of input, as stored."""
    tokens_per_document: float = 250.0
    """All passages of a document together."""
    passages_per_document: float = 1.0
    """Vectors of a document."""
    dim: int = 1024
    """Width of a vector."""
    bytes_per_component: int = 4
    """4 for float32, 2 for float16, 1 for int8."""
    num_gpus: int = 64
    """Of the pool."""
    utilisation: float = 0.95
    """Share of its time in which a GPU computes."""
    unit_bytes: int = 16 * 2**20
    """Of input in a unit of work."""
    plan_s_per_million_files: float = 60.0
    """To list, group and write down the units."""
    gpu_hourly_price: float = 2.0
    """For one GPU with its share of the machine."""
    put_price: float = 0.005
    """For 1,000 PUT or LIST requests."""
    get_price: float = 0.0004
    """For 1,000 GET requests."""
    storage_price: float = 0.023
    """For a GiB and a month."""

    def __post_init__(self) -> None:
        for name in ("documents", "tokens_per_s", "num_gpus", "unit_bytes", "dim"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; give more than 0")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(f"utilisation is {self.utilisation}; give more than 0, at most 1")


def forecast(config: ForecastConfig) -> dict[str, Any]:
    """Return what the run would take."""
    bytes_in = config.documents * config.bytes_per_document
    units = ceil(bytes_in / config.unit_bytes)
    passages = config.documents * config.passages_per_document
    row = config.dim * config.bytes_per_component + _BYTES_PER_ROW
    bytes_out = passages * row
    tokens = config.documents * config.tokens_per_document
    busy_hours = tokens / config.tokens_per_s / 3600
    gpu_hours = busy_hours / config.utilisation
    plan_s = config.plan_s_per_million_files * units / 1e6
    lists = 2 * ceil(units / _LISTED_PER_REQUEST)  # of the input, and of what is finished
    puts = units + lists + 3  # a file a unit; plan, file list and manifest
    costs = {
        "gpu_cost": gpu_hours * config.gpu_hourly_price,
        "request_cost": (puts * config.put_price + units * config.get_price) / 1000,
        "storage_cost_per_month": bytes_out / _GIB * config.storage_price,
    }
    return {
        "units": units,
        "puts_and_lists": puts,
        "gets": units,
        "gib_in": round(bytes_in / _GIB, 1),
        "gib_out": round(bytes_out / _GIB, 1),
        "tokens": round(tokens),
        "gpu_hours": round(gpu_hours, 1),
        "wall_hours": round(gpu_hours / config.num_gpus + plan_s / 3600, 2),
        **{name: round(cost, 2) for name, cost in costs.items()},
        "gpu_cost_per_million_documents": round(costs["gpu_cost"] / config.documents * 1e6, 4),
    }
