"""The forecast is arithmetic that can be checked by hand, and its inputs are those of real runs."""

import pytest

from qbatch.errors import ConfigError
from qbatch.report.forecast import ForecastConfig, forecast


def test_a_run_that_can_be_computed_in_the_head():
    config = ForecastConfig(
        documents=1_000_000,
        tokens_per_s=1000.0,
        bytes_per_document=2**20,
        tokens_per_document=360.0,
        dim=200,
        num_gpus=10,
        utilisation=0.5,
        unit_bytes=2**20,
        gpu_hourly_price=3.0,
        plan_s_per_million_files=3600.0,
    )
    found = forecast(config)
    assert found["units"] == found["gets"] == 1_000_000
    assert found["puts_and_lists"] == 1_000_000 + 2000 + 3
    assert found["tokens"] == 360_000_000
    assert found["gpu_hours"] == 200  # 100 hours of work, half of the time
    assert found["wall_hours"] == 21  # and one hour of planning
    assert found["gpu_cost"] == found["gpu_cost_per_million_documents"] == 600
    assert found["request_cost"] == pytest.approx(5.01 + 0.4, abs=0.01)
    assert found["gib_out"] == pytest.approx(920e6 / 2**30, abs=0.1)


def test_ten_times_the_documents_take_ten_times_as_much():
    small, large = (
        forecast(ForecastConfig(documents=n, tokens_per_s=20_000.0)) for n in (10**8, 10**9)
    )
    for name in ("units", "gpu_hours", "gib_out", "gpu_cost", "request_cost"):
        assert large[name] == pytest.approx(10 * small[name], rel=0.01, abs=0.1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"documents": 0}, "documents is 0"), ({"utilisation": 1.5}, "utilisation is 1.5")],
)
def test_impossible_figures_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        ForecastConfig(**{"documents": 1, "tokens_per_s": 1.0, **setting})
