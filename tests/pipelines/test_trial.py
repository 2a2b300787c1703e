"""Rows that kill their process are found whatever else happens, in few deaths."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from qbatch.pipelines.trial import Trial

GROUP = 5


class Died(BaseException):
    pass


def find(num_rows: int, deadly: set[int], contents: list[int]) -> tuple[list[int], int]:
    """Try again after each death, as a guard does; return what was found, and how many died."""
    deaths: Counter[str] = Counter()
    groups = [range(i, min(i + GROUP, num_rows)) for i in range(0, num_rows, GROUP)]
    while True:
        entered: list[str] = []

        def probe(rows: list[int]) -> None:
            if any(contents[row] in deadly for row in rows):
                raise Died

        try:
            trial = Trial(deaths, entered.append)
            return trial.killers(groups, probe, contents.__getitem__), deaths.total()
        except Died:
            deaths[entered[-1]] += 1


@given(st.data(), st.integers(1, 23))
def test_all_deadly_rows_are_found_and_no_other(data, num_rows):
    contents = data.draw(st.lists(st.integers(0, 30), min_size=num_rows, max_size=num_rows))
    deadly = data.draw(st.sets(st.sampled_from(contents), max_size=4))
    found, num_deaths = find(num_rows, deadly, contents)
    assert sorted(found) == [row for row in range(num_rows) if contents[row] in deadly]
    num_groups = len({row // GROUP for row in found})
    assert num_deaths <= 2 * len(deadly) + num_groups


@given(st.integers(1, 23), st.data())
def test_one_death_by_bad_luck_blames_nobody(num_rows, data):
    unlucky = data.draw(st.integers(0, num_rows - 1))
    trial = Trial({f"1 rows from {unlucky}": 1}, lambda _: None)
    groups = [range(i, min(i + GROUP, num_rows)) for i in range(0, num_rows, GROUP)]
    assert trial.killers(groups, lambda _: None) == []
