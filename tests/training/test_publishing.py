"""Directories that appear whole, on a disk and in an object store."""

import hashlib

import pytest
import torch

from qbatch.errors import ConfigError, IntegrityError, ObjectExistsError
from qbatch.storage import Storage
from qbatch.training.checkpoints import (
    History,
    complete_steps,
    read_resume_point,
    refuse_other_runs,
    step_directory,
    write_resume_point,
)
from qbatch.training.publishing import (
    delete_directory,
    publish_directory,
    read_complete,
    workspace,
)


def publish(storage: Storage, prefix: str, **facts) -> None:
    with workspace(storage) as folder:
        (folder / "sub").mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "sub" / "weights").write_bytes(b"abc")
        publish_directory(folder, storage, prefix, facts)


@pytest.mark.parametrize("prefix", ["", "checkpoints/step-00000001"])
def test_a_directory_counts_once_its_list_is_there(store_uri, prefix):
    storage = Storage(store_uri)
    assert read_complete(storage, prefix) is None
    publish(storage, prefix, step=1)
    facts = read_complete(storage, prefix)
    assert facts["step"] == 1
    assert [file["path"] for file in facts["files"]] == ["config.json", "sub/weights"]
    assert facts["files"][1]["sha256"] == hashlib.sha256(b"abc").hexdigest()
    path = f"{prefix}/sub/weights" if prefix else "sub/weights"
    assert storage.read(path) == b"abc"
    with pytest.raises(ObjectExistsError, match="exists already"):
        publish(storage, prefix)


def test_a_deleted_directory_is_gone(store_uri):
    storage = Storage(store_uri)
    publish(storage, "a")
    publish(storage, "b")
    delete_directory(storage, "a")
    assert read_complete(storage, "a") is None
    assert {info.path.split("/")[0] for info in storage.iter_objects()} == {"b"}


def test_a_damaged_list_is_an_error(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write("complete.json", b"{")
    with pytest.raises(IntegrityError, match="is damaged"):
        read_complete(storage)


def test_of_resume_points_the_newest_stays(store_uri):
    storage = Storage(store_uri)
    history = History(losses=[3.0], grad_norms=[1.0])
    write_resume_point(storage, {"weights/a": torch.ones(2)}, history, "mine")
    history = History(losses=[3.0, 2.0], grad_norms=[1.0, 0.5])
    write_resume_point(storage, {"weights/a": torch.zeros(2)}, history, "mine")
    assert complete_steps(storage, "resume", "mine") == [2]
    assert complete_steps(storage, "resume", "other") == []
    state, found = read_resume_point(storage, 2)
    assert found == history
    assert torch.equal(state["weights/a"], torch.zeros(2))


def test_a_half_written_point_does_not_count(store_uri):
    storage = Storage(store_uri)
    storage.write(f"{step_directory('resume', 7)}/state.safetensors", b"half")
    assert complete_steps(storage, "resume", "mine") == []


@pytest.mark.parametrize("prefix", ["", "checkpoints/step-00000001", "resume/step-00000001"])
def test_traces_of_another_run_are_refused(store_uri, prefix):
    storage = Storage(store_uri)
    publish(storage, prefix, fingerprint="theirs")
    refuse_other_runs(storage, "theirs")
    with pytest.raises(ConfigError, match="belongs to a training with other settings"):
        refuse_other_runs(storage, "mine")
