import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbatch.report.throughput import Throughput

UNITS = st.lists(
    st.tuples(st.floats(0, 3e5), st.floats(0, 5e3), st.integers(0, 10**6)), min_size=1, max_size=40
)


@given(UNITS)
def test_nothing_is_lost_and_the_series_stays_short(units):
    throughput = Throughput()
    for end_s, lasted_s, tokens in units:
        throughput.add(end_s, lasted_s, tokens=tokens)
    sums = throughput.sums("tokens")
    assert sum(sums) == pytest.approx(sum(tokens for _, _, tokens in units), abs=0.1)
    assert 1 <= len(sums) <= 60
    assert len(sums) * throughput.span_s >= max(end_s for end_s, _, _ in units)


def test_a_unit_counts_over_the_time_it_took():
    throughput = Throughput()
    throughput.add(25.0, 20.0, tokens=2000)
    assert throughput.span_s == 10
    assert throughput.sums("tokens") == [500, 1000, 500]
    assert throughput.rates("tokens") == [50, 100, 100]


def test_spans_grow_with_the_job():
    throughput = Throughput()
    for end_s in np.arange(10, 2401, 10.0):
        throughput.add(end_s, 10.0, tokens=100)
    assert throughput.span_s == 80
    assert set(throughput.rates("tokens")[:-1]) == {10.0}
