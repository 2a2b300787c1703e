"""A real object store without conditional PUT: OpenStack Swift with its S3 API, on loopback.

Debian packages: swift-proxy swift-account swift-container swift-object memcached. Four daemons and
rings of one device; runs as root or as a user who may write the given directory.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.processes import free_port, wait_for_url

PROGRAMS = (
    "swift-proxy-server",
    "swift-account-server",
    "swift-container-server",
    "swift-object-server",
    "swift-ring-builder",
    "memcached",
)

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test:tester", "AWS_SECRET_ACCESS_KEY": "testing"}

_PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {root}
workers = 1
user = {user}
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache s3api tempauth copy slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
"""
_PLAIN_FILTERS = ("catch_errors", "gatekeeper", "healthcheck", "copy", "slo", "dlo")
_STORE = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {root}
devices = {root}/devices
mount_check = false
workers = 1
user = {user}
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def swift_server(root: Path) -> Iterator[str]:
    """Run the daemons below ``root``; yield the URL of the S3 API."""
    user = os.environ.get("USER", "root")
    (root / "devices" / "d1").mkdir(parents=True)
    (root / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = test\n")
    ports = {name: free_port() for name in ("account", "container", "object", "proxy", "memcached")}
    for kind in ("account", "container", "object"):
        _build_ring(root, kind, ports[kind])
        conf = _STORE.format(port=ports[kind], root=root, kind=kind, user=user)
        (root / f"{kind}.conf").write_text(conf)
    filters = "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in _PLAIN_FILTERS)
    proxy = _PROXY.format(port=ports["proxy"], memcached=ports["memcached"], root=root, user=user)
    (root / "proxy.conf").write_text(proxy + filters)
    environment = {**os.environ, "SWIFT_TEST_CONFIG_DIR": str(root), "PYTHONPATH": ""}
    environment.pop("VIRTUAL_ENV", None)
    with ExitStack() as stack:
        commands = [["memcached", "-u", user, "-l", "127.0.0.1", "-p", str(ports["memcached"])]]
        commands += [
            [f"swift-{kind}-server", str(root / f"{kind}.conf")]
            for kind in ("account", "container", "object", "proxy")
        ]
        for command in commands:
            stack.enter_context(_running(command, environment, root / "log"))
        url = f"http://127.0.0.1:{ports['proxy']}"
        wait_for_url(f"{url}/healthcheck", root / "log")
        yield url


@contextmanager
def _running(command: list[str], environment: dict, log: Path) -> Iterator[None]:
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _build_ring(root: Path, kind: str, port: int) -> None:
    builder = str(root / f"{kind}.builder")
    for arguments in (
        ["create", "4", "1", "0"],
        ["add", f"r1z1-127.0.0.1:{port}/d1", "1"],
        ["rebalance"],
    ):
        command = ["swift-ring-builder", builder, *arguments]
        subprocess.run(
            command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""}
        )
