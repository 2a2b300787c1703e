import pytest

from qbatch.index.device import use_threads


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small indexes gain nothing from threads, which wait for each other on a busy machine."""
    use_threads(1)
