"""The lease of a night: held by one, waited for, taken over from the dead."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qbatch.errors import IntegrityError, LeaseHeldError, StorageError
from qbatch.lease import Lease, hold_lease, latest_lease
from qbatch.storage import Storage


def test_one_holds_it_and_the_other_leaves(store_uri):
    storage = Storage(store_uri)
    assert latest_lease(storage) is None
    with hold_lease(storage, holder="first", lease_s=60):
        assert latest_lease(storage).is_live
        with (
            pytest.raises(LeaseHeldError, match=r"first works in .* Wait with --wait-s"),
            hold_lease(storage, holder="second", lease_s=60),
        ):
            pass
    assert not latest_lease(storage).is_live
    with hold_lease(storage, holder="second", lease_s=60):
        assert (latest_lease(storage).number, latest_lease(storage).holder) == (2, "second")


def test_of_many_that_wait_each_has_it_alone(tmp_path):
    storage = Storage(str(tmp_path))
    inside: list[int] = []
    most: list[int] = []

    def work(i: int) -> None:
        with hold_lease(storage, holder=str(i), lease_s=60, wait_s=60):
            inside.append(i)
            most.append(len(inside))
            time.sleep(0.02)
            inside.remove(i)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert most == [1] * 8


def test_the_dead_lose_it_when_it_expires(tmp_path):
    storage = Storage(str(tmp_path))
    dead = Lease(number=1, holder="dead", nonce="", expires=time.time() + 1)
    storage.create(dead.path, dead.to_json())
    waited = time.monotonic()
    with hold_lease(storage, holder="heir", lease_s=60, wait_s=30):
        assert latest_lease(storage).number == 2
    assert time.monotonic() - waited < 30


def test_a_beating_heart_keeps_it(tmp_path):
    storage = Storage(str(tmp_path))
    with hold_lease(storage, holder="first", lease_s=0.6):
        first = latest_lease(storage).expires
        deadline = time.monotonic() + 20
        while latest_lease(storage).expires <= first + 0.6 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert latest_lease(storage).expires > first + 0.6


def test_no_lease_is_asked_for_without_one(tmp_path):
    storage = Storage(str(tmp_path))
    with (
        hold_lease(storage, holder="first", lease_s=60),
        hold_lease(storage, holder="x", lease_s=0),
    ):
        assert latest_lease(storage).holder == "first"


def test_the_body_fails_as_itself_and_the_lease_is_given_back(tmp_path):
    storage = Storage(str(tmp_path))
    with pytest.raises(KeyError), hold_lease(storage, holder="first", lease_s=60):
        raise KeyError("x")
    assert not latest_lease(storage).is_live


def test_a_store_that_fails_meanwhile_does_not_end_the_work(tmp_path, caplog):
    class FailingStorage(Storage):
        def write(self, path, data):
            raise StorageError("503 slow down")

    with hold_lease(FailingStorage(str(tmp_path)), holder="first", lease_s=60):
        pass
    assert "the lease could not be renewed: 503 slow down" in caplog.text


def test_a_damaged_lease_is_named(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write("leases/00000001.json", b"{")
    with (
        pytest.raises(IntegrityError, match=r"00000001\.json is not a lease"),
        hold_lease(storage, holder="x", lease_s=60),
    ):
        pass
