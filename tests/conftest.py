"""Real parts shared by all tests: an S3 server process, buckets, and a place for each test."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator

import pytest
import s3fs

from tests.processes import free_port, wait_for_url

# Many processes share few cores here: threads that spin while they wait would starve the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real HTTP S3 server in its own process; AWS_* variables point every client at it."""
    port = free_port()
    log = tmp_path_factory.mktemp("s3") / "server.log"
    output = log.open("wb")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=output,
        stderr=output,
    )
    url = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        wait_for_url(f"{url}/moto-api/data.json", log)
        yield url
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def s3_bucket(s3_endpoint: str) -> str:
    """``s3://`` URI of a fresh bucket."""
    bucket = f"test-{secrets.token_hex(6)}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(params=["disk", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path) -> str:
    """URI of an empty place, once on disk and once on the S3 server."""
    if request.param == "disk":
        return str(tmp_path / "store")
    return request.getfixturevalue("s3_bucket") + "/store"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a random one-layer encoder that loads in a second."""
    from tests.tiny_models import write_tiny_encoder  # noqa: PLC0415 - imports torch

    return str(write_tiny_encoder(tmp_path_factory.mktemp("tiny-model")))


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a random one-layer cross-encoder that loads in a second."""
    from tests.tiny_models import write_tiny_cross_encoder  # noqa: PLC0415 - imports torch

    return str(write_tiny_cross_encoder(tmp_path_factory.mktemp("tiny-reranker")))


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a random one-layer Qwen3 reranker that loads in a second."""
    from tests.tiny_models import write_tiny_judge  # noqa: PLC0415 - imports torch

    return str(write_tiny_judge(tmp_path_factory.mktemp("tiny-judge")))


@pytest.fixture(scope="session")
def ray_cluster(s3_endpoint: str) -> Iterator[None]:
    """A local Ray for this session's in-process jobs; its workers can reach the S3 server."""
    import ray  # noqa: PLC0415 - slow, and most tests need none

    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        object_store_memory=2**29,
        include_dashboard=False,
    )
    yield
    ray.shutdown()
