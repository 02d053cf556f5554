"""The benchmark of GPUs runs at rehearsal size on a CPU, goes on after it was killed, and plans published sizes."""

import json

import pytest

from diffsynth_core.models.loading import shape_problems
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.memory.activations import step_components
from diffsynth_core.planning.memory.flops import step_flops
from diffsynth_core.planning.memory.sizes import find_workload
from tests.gpu import bench
from tests.gpu.measure import Outcome, make, measure
from tests.gpu.page import HEAD, PAGE, device_peak, page
from tests.gpu.rows import ROWS

SHORT = {
    "same losses: 15 of 30 blocks swapped",
    "same losses: fused backward pass",
    "same losses: fused AdamW",
    "Qwen-Image LoRA, nf4",
    "Qwen-Image LoRA, fp8",
    "FLUX.1 LoRA, bf16",
}
SPEED = [row.name for row in ROWS if row.tolerance is None][:2]
PLANNED = ("Qwen-Image LoRA, bf16, 45 blocks swapped", "FLUX.1 LoRA, nf4", "Wan 14B LoRA, 480 x 832 x 81, fp8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny weights are made once for all."""
    return tmp_path_factory.mktemp("bench")


# As in tests/runs/test_compiled.py, for rows that compile.
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=() if row.name in SHORT else pytest.mark.long) for row in ROWS]
)
def test_every_row_runs_on_tiny_models(row, folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = measure(row, "rehearsal", folder)
    assert found.seconds > 0
    assert found.flops > 0
    assert found.difference is None if row.tolerance is None else found.difference <= row.tolerance
    assert row.name in page([found])


@pytest.mark.parametrize("name", PLANNED)
def test_a_row_of_published_size_is_planned_from_headers(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = next(row for row in ROWS if row.name == name)
    plan = make(row, "real", tmp_path, "cuda")
    files = plan.model.components["dit"]
    assert step_components(plan) == {"dit"}
    assert shape_problems(load_family(plan.model.facts.name), files) == []
    assert sum(path.stat().st_blocks for path in files.paths) * 512 < 10**6  # a hole, not 40 GB on the disk
    assert step_flops(plan, find_workload(plan).largest).total > 2e14


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """It was killed while it wrote the second line; the first row is not measured again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    first, second = SPEED
    told = json.dumps(vars(Outcome(first, "rehearsal", "a device", "2.0", seconds=0.5)))
    results = tmp_path / "work" / "rehearsal.jsonl"
    results.write_text(f"{told}\n{told[:20]}")
    arguments = ["--size", "rehearsal", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "page.md")]
    assert bench.main([*arguments, "--minutes", "0", "--only", first, second]) == 0
    assert not (tmp_path / "page.md").exists()
    assert bench.main([*arguments, "--only", first, second]) == 0
    assert [found["row"] for found in bench.read_lines(results)] == [first, second]
    assert bench.read_lines(results)[1]["fault"] == ""
    written = (tmp_path / "page.md").read_text()
    assert f"| {first} | 2 |" in written
    assert f"| {second} | " in written


@pytest.mark.slow
def test_a_row_that_fails_or_takes_too_long_is_told(tmp_path):
    assert bench.measured("no such row", "rehearsal", tmp_path, 300)["fault"]
    assert bench.measured(SPEED[0], "rehearsal", tmp_path, 0.1) is None


def test_the_page_of_the_repository_is_written_by_this_script():
    """With figures or without."""
    before, after = HEAD.split("{device}")
    written = PAGE.read_text(encoding="utf-8")
    assert written.startswith(before)
    assert after in written


def test_the_page_tells_shares_faults_and_differences():
    card = {"size": "real", "device": "NVIDIA H100 80GB HBM3", "torch": "2.9"}
    speed, same, other = SPEED[0], ROWS[0].name, ROWS[1].name
    told = page(
        [
            Outcome(speed, **card, seconds=0.5, flops=240e12, peak=45 * 2**30, estimate=44 * 2**30),
            Outcome(same, **card, difference=0.0),
            Outcome(other, **card, difference=0.5),
            Outcome(SPEED[1], size="real", fault="over 240 s"),
        ]
    )
    assert f"| {speed} | 2 | 240 | 49% | 45.0 GiB | 44.0 GiB |  |" in told  # 240 / (0.5 x 989.4)
    assert f"| {same} | 0 | 0.001 | same |" in told
    assert f"| {other} | 0.5 | 0.1 | **differs** |" in told
    assert f"| {SPEED[1]} | - | - | - | - | - | over 240 s |" in told
    assert "Measured on: NVIDIA H100 80GB HBM3, torch 2.9, real size." in told


def test_the_peak_of_a_device_is_found_by_its_name():
    assert device_peak("NVIDIA H100 80GB HBM3") == 989.4e12
    assert device_peak("NVIDIA H100 PCIe") == 756e12
    assert device_peak("NVIDIA GeForce RTX 4090") == 165.2e12
    assert device_peak("another") is None
