"""The broken protocol still takes the place of the real one; what it does, the slow tests see."""

from qbatch.pipelines import embed, embed_resume, embed_write
from tests.faults.broken_protocol import append_everything


def replaced() -> list[bool]:
    names = (
        embed_write.write_unit_file,
        embed.finished_units,
        embed_resume.listed_files,
    )
    return [name.__module__ == "tests.faults.broken_protocol" for name in names]


def test_it_replaces_the_three_steps_that_make_ours_safe():
    with append_everything(is_on=True):
        assert all(replaced())
    assert not any(replaced())
    with append_everything(is_on=False):
        assert not any(replaced())
