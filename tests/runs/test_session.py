"""A session as a notebook uses it: plan, train stage by stage, rehearse, without the command line."""

from pathlib import Path

import pytest

from diffsynth_core.errors import FaultsFound
from diffsynth_core.session import Session

STAGES = """
extends: qwen-image-lora
parameters: {dataset_num_workers: 0, dataset_repeat: 1, num_epochs: 1, lora_rank: 4, device: cpu}
stages:
  high: {parameters: {max_timestep_boundary: 0.4}}
  low: {parameters: {min_timestep_boundary: 0.4}}
"""


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    path = tmp_path / "staged.yaml"
    path.write_text(STAGES, encoding="utf-8")
    return path


def test_the_five_lines_of_the_documentation_train(tiny_models, photographs, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_models))
    session = Session.of(recipe="qwen-image-lora", dataset_base_path=str(photographs), max_steps=2, device="cpu",
                         dataset_num_workers=0, lora_rank=4)  # fmt: skip
    session.download()
    (result,) = session.train()
    assert result.checkpoint == Path("models/train/qwen-image-lora/epoch-0.safetensors")
    assert result.checkpoint.exists()


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"num_processes": 2}, ["num_processes"]),
        ({"accelerate_config": "ddp"}, ["accelerate_config"]),
        ({"num_processes": 3, "accelerate_config": "ddp"}, ["num_processes", "accelerate_config"]),
        ({"num_processes": 1}, []),
    ],
)
def test_processes_that_a_session_does_not_start_are_refused(tmp_path, given, refused):
    session = Session.of(recipe="qwen-image-lora", dataset_base_path=str(tmp_path / "missing"), device="cpu", **given)
    if not refused:
        assert session.plan(without_files=True)
        return
    with pytest.raises(FaultsFound) as caught:
        session.plan(without_files=True)
    found = caught.value.problems[: len(refused)]  # then what is missing
    assert [problem.message.split("`")[1] for problem in found] == refused
    assert all("diffsynth train" in (problem.hint or "") for problem in found)


def test_stages_start_when_their_results_are_asked_for(tiny_models, photographs, staged, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_models))
    session = Session.of(config=str(staged), dataset_base_path=str(photographs), output_path="out")
    announced: list[str | None] = []
    results = session.train(announce=lambda stage, plan: announced.append(stage))
    assert next(results).folder == Path("out/high")
    assert announced == ["high"] and not Path("out/low").exists()
    assert next(results).checkpoint == Path("out/low/epoch-0.safetensors")
    resumed = Session.of(config=str(staged), dataset_base_path=str(photographs), output_path="out", resume="auto")
    assert resumed.plan() == {}, "completed stages are left out"


def test_the_problems_of_all_stages_are_raised_together(staged, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "1")
    session = Session.of(config=str(staged), dataset_base_path=str(tmp_path / "missing"), lora_rank=0)
    with pytest.raises(FaultsFound) as caught:
        session.plan()
    assert any("lora_rank" in problem.message for problem in caught.value.problems)
    plans = Session.of(config=str(staged), dataset_base_path=str(tmp_path / "missing")).plan(without_files=True)
    assert list(plans) == ["high", "low"]


def test_a_rehearsal_is_a_session_on_tiny_weights(staged):
    session = Session.of(config=str(staged), rehearse=True, max_steps=2)
    found = dict(session.rehearse())
    assert list(found) == ["high", "low"]
    assert all(rehearsal.checkpoint.exists() and rehearsal.proofs for rehearsal in found.values())
