"""A lease: at most one night works at a time, as long as clocks and processes behave.

``leases/<8 digits>.json`` is created create-only and rewritten by its holder while it works; who
finds the newest one expired takes the next number. This saves the money of doing work twice, and
nothing rests on it: two nights at once are safe, one of them loses the race to publish.
"""

import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from qbatch.errors import IntegrityError, LeaseHeldError, ObjectExistsError, StorageError
from qbatch.storage import Storage

log = logging.getLogger(__name__)

_NAME = re.compile(r"leases/(\d{8})\.json")

_BEATS_PER_LEASE = 3
"""A late or lost heartbeat must not cost the lease."""

_POLL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who may work until when."""

    number: int
    holder: str
    """A name for people: machine and process."""
    nonce: str
    expires: float
    """Seconds since 1970 by the holder's clock."""

    @property
    def is_live(self) -> bool:
        """Its holder works, or has died so lately that nobody can tell."""
        return self.expires > time.time()

    @property
    def path(self) -> str:
        """Where it is stored."""
        return f"leases/{self.number:08d}.json"

    def to_json(self) -> bytes:
        """Return the stored form."""
        return json.dumps(asdict(self)).encode()


def latest_lease(storage: Storage) -> Lease | None:
    """Return the newest lease, live or not; None before the first.

    Raises:
        IntegrityError: It cannot be read.
    """
    paths = [o.path for o in storage.iter_objects("leases") if _NAME.fullmatch(o.path)]
    if not paths:
        return None
    try:
        return Lease(**json.loads(storage.read(max(paths))))
    except (TypeError, ValueError) as error:
        raise IntegrityError(
            f"{storage.object_uri(max(paths))} is not a lease ({error}). Make sure that no night "
            "is running, and delete it"
        ) from error


@contextmanager
def hold_lease(
    storage: Storage, *, holder: str, lease_s: float, wait_s: float = 0.0
) -> Iterator[None]:
    """Hold the lease of a directory while the body runs.

    Args:
        storage: The directory.
        holder: Who asks.
        lease_s: Seconds after which a holder that gives no sign is taken for dead; 0 asks for no
            lease and looks at none.
        wait_s: How long to wait for another holder.

    Raises:
        LeaseHeldError: Another holder works, and did not end within ``wait_s``.
    """
    if lease_s <= 0:
        yield
        return
    lease = _wait_for_lease(storage, holder, lease_s, wait_s)
    stop = threading.Event()
    heart = threading.Thread(
        target=_beat, args=(storage, lease, lease_s, stop), name="lease", daemon=True
    )
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        _rewrite(storage, lease, time.time())


def _wait_for_lease(storage: Storage, holder: str, lease_s: float, wait_s: float) -> Lease:
    deadline = time.monotonic() + wait_s
    while True:
        last = latest_lease(storage)
        if last is None or not last.is_live:
            lease = _take(storage, holder, lease_s, last)
            if lease is not None:
                return lease
            continue  # another was faster: look at what it wrote
        left = deadline - time.monotonic()
        if left <= 0:
            raise LeaseHeldError(
                f"{last.holder} works in {storage.uri} and holds the lease for another "
                f"{last.expires - time.time():.0f} s, unless it renews it. Wait with --wait-s, or "
                "run again when it is done"
            )
        log.info("waiting for %s, which holds the lease of %s", last.holder, storage.uri)
        time.sleep(min(left, _POLL_S, max(0.05, last.expires - time.time())))


def _take(storage: Storage, holder: str, lease_s: float, last: Lease | None) -> Lease | None:
    lease = Lease(
        number=last.number + 1 if last else 1,
        holder=holder,
        nonce=secrets.token_hex(8),
        expires=time.time() + lease_s,
    )
    try:
        storage.create(lease.path, lease.to_json())
    except ObjectExistsError:
        return None
    return lease


def _beat(storage: Storage, lease: Lease, lease_s: float, stop: threading.Event) -> None:
    while not stop.wait(lease_s / _BEATS_PER_LEASE):
        _rewrite(storage, lease, time.time() + lease_s)


def _rewrite(storage: Storage, lease: Lease, expires: float) -> None:
    renewed = Lease(**{**asdict(lease), "expires": expires})
    try:
        storage.write(lease.path, renewed.to_json())
    except StorageError as error:  # the work goes on: at worst somebody else does it too
        log.warning("the lease could not be renewed: %s", error)
