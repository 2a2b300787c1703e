"""Merges against the formulas, and the memory that a merge takes."""

import json
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qbatch.errors import ConfigError
from qbatch.training.merging import (
    MergeSettings,
    merge_weights,
    slerp_shares,
    spherical_mean_shares,
)
from qbatch.training.weight_streams import read_header
from tests.processes import ROOT


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """The formula, for vectors that are not near parallel."""
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def vectors(count: int, *, dim: int = 50, unit: bool = False, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim)) + 0.5
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if unit else rows


def merged(rows: np.ndarray, weights: list[float], shares_of=slerp_shares) -> np.ndarray:
    return shares_of(rows @ rows.T, weights) @ rows


BOTH = pytest.mark.parametrize("shares_of", [slerp_shares, spherical_mean_shares])


@BOTH
def test_endpoints_are_the_checkpoints(shares_of):
    rows = vectors(2)
    np.testing.assert_allclose(merged(rows, [1.0, 0.0], shares_of), rows[0], atol=1e-6)
    np.testing.assert_allclose(merged(rows, [0.0, 1.0], shares_of), rows[1], atol=1e-6)


@BOTH
def test_the_midpoint_lies_on_the_sphere_between_both(shares_of):
    rows = vectors(2, unit=True)
    middle = merged(rows, [0.5, 0.5], shares_of)
    assert np.linalg.norm(middle) == pytest.approx(1)
    assert middle @ rows[0] == pytest.approx(middle @ rows[1])
    half = np.arccos(rows[0] @ rows[1]) / 2
    assert np.arccos(middle @ rows[0]) == pytest.approx(half)


@BOTH
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_two_unit_vectors_follow_the_formula(shares_of, t):
    rows = vectors(2, unit=True)
    np.testing.assert_allclose(merged(rows, [1 - t, t], shares_of), slerp(*rows, t), atol=1e-6)


def test_lengths_are_interpolated_too():
    rows = vectors(2)
    np.testing.assert_allclose(merged(rows, [0.7, 0.3]), slerp(*rows, 0.3))
    mean = merged(rows, [0.5, 0.5], spherical_mean_shares)
    assert np.linalg.norm(mean) == pytest.approx(np.linalg.norm(rows, axis=1).mean())


@BOTH
def test_near_parallel_vectors_are_interpolated_linearly(shares_of):
    first = vectors(1)[0]
    for other in (first, first + 1e-4 * vectors(1, seed=1)[0], 2 * first):
        rows = np.stack([first, other])
        np.testing.assert_allclose(merged(rows, [0.25, 0.75], shares_of), [0.25, 0.75] @ rows)


def test_opposite_vectors_are_interpolated_linearly():
    first = vectors(1)[0]
    np.testing.assert_allclose(merged(np.stack([first, -first]), [0.75, 0.25]), first / 2)


@BOTH
def test_a_tensor_of_zeros_has_no_direction(shares_of):
    rows = np.stack([np.zeros(50), vectors(1)[0]])
    np.testing.assert_allclose(merged(rows, [0.5, 0.5], shares_of), rows[1] / 2)


def test_three_vectors_are_folded_one_after_the_other():
    rows = vectors(3)
    expected = slerp(slerp(rows[0], rows[1], 1 / 2), rows[2], 1 / 3)
    np.testing.assert_allclose(merged(rows, [1 / 3] * 3), expected)
    weights = [0.5, 0.2, 0.3]
    expected = slerp(slerp(rows[0], rows[1], 0.2 / 0.7), rows[2], 0.3)
    np.testing.assert_allclose(merged(rows, weights), expected)


def test_the_spherical_mean_of_three_knows_no_order():
    rows = vectors(3, unit=True)
    orders = [list(p) for p in permutations(range(3))]
    means = [merged(rows[order], [1 / 3] * 3, spherical_mean_shares) for order in orders]
    for mean in means[1:]:
        np.testing.assert_allclose(mean, means[0], atol=1e-7)


def test_the_spherical_mean_has_the_least_squared_angles():
    rows, weights = vectors(3, unit=True), np.array([0.5, 0.3, 0.2])
    mean = merged(rows, list(weights), spherical_mean_shares)

    def cost(point: np.ndarray) -> float:
        return weights @ np.arccos(np.clip(rows @ point / np.linalg.norm(point), -1, 1)) ** 2

    rng = np.random.default_rng(1)
    nearby = [cost(mean + 1e-3 * rng.normal(size=50)) for _ in range(50)]
    assert cost(mean) < min(nearby)


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], *, parts: int = 1) -> Path:
    folder.mkdir()
    names = sorted(tensors)
    for i in range(parts):
        part = {name: tensors[name] for name in names[i::parts]}
        save_file(part, folder / f"model-{i}.safetensors", metadata={"format": "pt"})
    return folder


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"norm": (7,), "layers.0.weight": (30, 20), "table": (100, 9)}
    drawn = {n: torch.randn(s, generator=generator) + 0.5 for n, s in shapes.items()}
    return {n: x.to(dtype) for n, x in drawn.items()} | {"steps": torch.tensor([3])}


def merge(folders: list[Path], output: Path, base: Path | None = None, **settings) -> dict:
    output.mkdir()
    weights = settings.get("weights", (1 / len(folders),) * len(folders))
    method = settings.get("method", "slerp")
    merge_weights(folders, output, MergeSettings(method=method, weights=weights), base)
    return {k: x for file in output.glob("*.safetensors") for k, x in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_files_are_merged_tensor_by_tensor_in_their_dtype(tmp_path, dtype):
    states = [tensors(seed, dtype) for seed in (0, 1)]
    folders = [
        write_checkpoint(tmp_path / "a", states[0], parts=2),
        write_checkpoint(tmp_path / "b", states[1]),
    ]
    found = merge(folders, tmp_path / "out")
    assert found.keys() == states[0].keys()
    assert torch.equal(found["steps"], torch.tensor([3]))
    for name in ("norm", "layers.0.weight", "table"):
        pair = [state[name].double().flatten().numpy() for state in states]
        expected = torch.from_numpy(slerp(*pair, 0.5)).view(found[name].shape)
        assert found[name].dtype == dtype
        torch.testing.assert_close(
            found[name], expected.to(dtype), rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5
        )
    headers = [read_header(tmp_path / side / "model-1.safetensors")[0] for side in ("a", "out")]
    assert headers[0] == headers[1]


def test_a_checkpoint_merged_with_itself_keeps_every_byte(tmp_path):
    folder = write_checkpoint(tmp_path / "a", tensors(0, torch.bfloat16))
    merge([folder, folder, folder], tmp_path / "out")
    name = "model-0.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_differences_from_a_base_are_merged(tmp_path):
    base = tensors(0)
    moved = [{n: base[n] + x if n != "steps" else x for n, x in tensors(s).items()} for s in (1, 2)]
    folders = [write_checkpoint(tmp_path / f"c{i}", state) for i, state in enumerate(moved)]
    whole = {f"model.{name}": x for name, x in base.items()} | {"lm_head.weight": torch.ones(2)}
    found = merge(folders, tmp_path / "out", write_checkpoint(tmp_path / "base", whole))
    for name in ("norm", "table"):
        pair = [(state[name] - base[name]).double().flatten().numpy() for state in moved]
        expected = base[name] + torch.from_numpy(slerp(*pair, 0.5)).view(base[name].shape)
        torch.testing.assert_close(found[name], expected.float(), rtol=1e-5, atol=1e-5)


def test_checkpoints_of_other_shapes_are_refused(tmp_path):
    other = tensors(1) | {"norm": torch.ones(8)}
    folders = [
        write_checkpoint(tmp_path / "a", tensors(0)),
        write_checkpoint(tmp_path / "b", other),
    ]
    with pytest.raises(ConfigError, match=r"do not have the same tensors: 1 differ.*'norm'"):
        merge(folders, tmp_path / "out")


def test_differing_integers_are_refused(tmp_path):
    other = tensors(1) | {"steps": torch.tensor([4])}
    folders = [
        write_checkpoint(tmp_path / "a", tensors(0)),
        write_checkpoint(tmp_path / "b", other),
    ]
    with pytest.raises(ConfigError, match=r"'steps' holds torch\.int64 and differs"):
        merge(folders, tmp_path / "out")


def test_a_base_without_a_tensor_is_refused(tmp_path):
    folders = [write_checkpoint(tmp_path / f"c{i}", tensors(i)) for i in range(2)]
    base = write_checkpoint(tmp_path / "base", {"norm": torch.ones(7)})
    with pytest.raises(ConfigError, match=r"has no tensor like 'layers\.0\.weight'"):
        merge(folders, tmp_path / "out", base)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0not json at all!"])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, content):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="is not a safetensors file we can read"):
        merge([folder, folder], tmp_path / "out")


MEASURE = """
import json, re, sys
from pathlib import Path
from qbatch.training.merging import MergeSettings, merge_weights

def peak():  # of this program; ru_maxrss would count what its parent held when it started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

settings = MergeSettings(method="slerp", weights=(0.5, 0.5))
before = peak()
merge_weights([Path(p) for p in sys.argv[1:3]], Path(sys.argv[3]), settings)
print(json.dumps([before, peak()]))
"""


def peak_of_merge(tmp_path: Path, num_bytes: int) -> list[int]:
    """Merge bfloat16 checkpoints of this size, most of it one tensor; memory before, at most."""
    rows = num_bytes // 2 // 1024
    for side in ("a", "b"):
        generator = torch.Generator().manual_seed(ord(side))
        table = torch.empty(rows, 1024, dtype=torch.bfloat16)
        for part in table.split(4096):
            part.copy_(torch.randn(part.shape, generator=generator))
        small = {f"layers.{i}.weight": table[:64] * (i + 1) for i in range(4)}
        write_checkpoint(tmp_path / side, {"table": table, **small})
        del table
    (tmp_path / "out").mkdir()
    folders = [str(tmp_path / name) for name in ("a", "b", "out")]
    command = [sys.executable, "-c", MEASURE, *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    file = "model-0.safetensors"
    sizes = [(tmp_path / name / file).stat().st_size for name in ("a", "out")]
    assert sizes[0] == sizes[1] >= num_bytes
    return json.loads(done.stdout)


def test_memory_does_not_grow_with_the_checkpoints(tmp_path):
    before, peak = peak_of_merge(tmp_path, 200 * 2**20)
    assert peak - before < 100 * 2**20  # one checkpoint alone is 200 MiB, in float32 twice that


@pytest.mark.slow
def test_two_gigabyte_checkpoints_merge_below_one(tmp_path):
    _, peak = peak_of_merge(tmp_path, 2 * 2**30)
    print(f"peak {peak / 2**20:.0f} MiB")
    assert peak < 2**30
