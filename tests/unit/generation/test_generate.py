"""Generating with the toy family: what is loaded, what comes from the cache, and how a stop ends it."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.resolve import resolve
from diffsynth_core.errors import DiffSynthError, Interrupted, collect_problems
from diffsynth_core.generation import encoding
from diffsynth_core.generation.encoding import encode_jobs
from diffsynth_core.generation.generate import generate
from diffsynth_core.generation.generation_plan import GenerationPlan
from diffsynth_core.models.registry import FAMILIES, load_family
from diffsynth_core.planning.data.encodings import plan_encodings
from diffsynth_core.planning.drawing.jobs import GenerationJob
from diffsynth_core.planning.model.components import find_components
from diffsynth_core.planning.plan import Machine, make_plan
from diffsynth_core.progress import SilentReporter, SilentTask
from diffsynth_core.stop import StopRequest
from tests.toy_family import ENTRIES, MODEL_ID, PLACES, TOY, Toy

pytestmark = pytest.mark.slow

JOB = GenerationJob(
    prompt="a cat", negative_prompt="", seed=1, steps=3, cfg_scale=2.0, guidance=None, height=32, width=32, num_frames=5
)
QUIET = SilentReporter()


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", TOY)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for component, place in zip(("dit", "text_encoder", "vae"), PLACES.values(), strict=True):
        Toy().write_tiny_weights(folder, component, MODEL_ID, place)
    return folder


@pytest.fixture
def plan(base, tmp_path):
    """Return a plan of jobs, with a mask if `extra_inputs` ask for one."""

    def make(*jobs: GenerationJob, extra_inputs: tuple[str, ...] = ()) -> GenerationPlan:
        parameters = Parameters(model_id_with_origin_paths=tuple(ENTRIES), extra_inputs=extra_inputs)
        with collect_problems() as problems:
            found = find_components(parameters, None, base)
        assert found and not problems, problems
        machine = Machine(device="cpu", mixed_precision="no")
        return GenerationPlan(model=found, machine=machine, jobs=jobs, cache=tmp_path / "cache")

    return make


def test_each_job_has_its_pixels_in_order(plan):
    other = replace(JOB, seed=2, height=24, num_frames=1)
    found = list(generate(plan(JOB, other, replace(JOB, cfg_scale=1.0)), QUIET, StopRequest()))
    assert [job.seed for job, _ in found] == [1, 2, 1]
    assert [pixels.shape for _, pixels in found] == [(5, 32, 32, 3), (1, 24, 32, 3), (5, 32, 32, 3)]
    first, _, unguided = (pixels for _, pixels in found)
    assert first.dtype == np.uint8 and first.std() > 1
    assert (first != unguided).any(), "guidance has a say"
    (again,) = generate(plan(JOB), QUIET, StopRequest())
    assert (again[1] == first).all()


def test_without_guidance_nothing_is_predicted_or_encoded_for_the_negative_prompt(plan, monkeypatch):
    calls = []
    predict = Toy.predict_velocity
    monkeypatch.setattr(Toy, "predict_velocity", lambda *given: (calls.append(given), predict(*given))[1])
    job = replace(JOB, negative_prompt="a dog")
    made = plan(replace(job, cfg_scale=1.0))
    list(generate(made, QUIET, StopRequest()))
    assert len(calls) == 3 and len(list(made.cache.rglob("*.safetensors"))) == 1
    list(generate(plan(job), QUIET, StopRequest()))
    assert len(calls) == 3 + 6 and len(list(made.cache.rglob("*.safetensors"))) == 2


def test_latents_that_are_not_finite_are_an_error_and_no_image(plan, monkeypatch):
    monkeypatch.setattr(Toy, "predict_velocity", lambda self, components, noisy, *_: noisy / 0)
    with pytest.raises(DiffSynthError, match="predictions of the dit contain NaN or Inf") as caught:
        list(generate(plan(JOB), QUIET, StopRequest()))
    assert "--mixed_precision" in str(caught.value.problems[0].hint)


def test_one_of_two_transformers_draws_alone_with_a_warning(plan):
    warned: list[str] = []
    reporter = SilentReporter()
    reporter.warn = warned.append
    made = plan(JOB)
    two = replace(made.model.variant, sampling=replace(made.model.variant.sampling, boundary=0.875))
    list(generate(replace(made, model=replace(made.model, variant=two)), reporter, StopRequest()))
    assert len(warned) == 1 and "one of the two transformers" in warned[0] and "0.875" in warned[0]
    list(generate(made, reporter, StopRequest()))
    assert len(warned) == 1


def test_cached_prompts_need_no_encoder(plan, monkeypatch):
    list(generate(plan(JOB), QUIET, StopRequest()))
    monkeypatch.setattr(encoding, "load_planned", lambda *_, **__: pytest.fail("an encoder was loaded"))
    list(generate(plan(replace(JOB, seed=5)), QUIET, StopRequest()))


def test_what_training_cached_is_found(plan, base, tmp_path):
    """The caption and the mask of a row, at the size of training; the target alone is not encoded."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name in ("target", "mask"):
        Image.fromarray(np.full((32, 32), 200, np.uint8)).save(folder / f"{name}.png")
    (folder / "metadata.csv").write_text("video,control_mask,prompt\ntarget.png,mask.png,a cat\n")
    values = {
        "model_id_with_origin_paths": ENTRIES, "dataset_base_path": folder, "output_path": tmp_path / "out",
        "height": 32, "width": 32, "num_frames": 1, "lora_base_model": "dit", "lora_target_modules": "up,down",
        "extra_inputs": "control_mask", "data_file_keys": "video,control_mask", "cache_path": tmp_path / "cache", "mixed_precision": "no",
    }  # fmt: skip
    trained = plan_encodings(make_plan(resolve(values), QUIET, base=base), QUIET)
    job = replace(JOB, num_frames=1, cfg_scale=1.0, images={"control_mask": (folder / "mask.png",)})
    (encoded,) = encode_jobs(plan(job, extra_inputs=("control_mask",)), load_family("toy"), QUIET, StopRequest())
    keys = {entry.encoder.name: entry.key for entry in encoded.positive}
    assert keys == {part.encoder.name: part.key(0) for part in trained.encoders if part.encoder.name != "latents"}
    assert keys.keys() == {"text", "mask"}


class StoppingReporter(SilentReporter):
    """Requests a stop after some steps."""

    def __init__(self, stop: StopRequest, steps: int) -> None:
        self.stop, self.left = stop, steps

    @contextmanager
    def task(self, label, total, unit, done=0):
        yield self if unit == "steps" else SilentTask()

    def advance(self, amount=1, **fields):
        self.left -= amount
        if self.left == 0:
            self.stop.signal_number = 2


@pytest.mark.parametrize(("steps", "finished"), [(2, 0), (3, 1), (4, 1), (5, 1), (6, 2)])
def test_a_stop_ends_it_between_steps_and_keeps_what_is_finished(plan, steps, finished):
    stop, made = StopRequest(), []
    with pytest.raises(Interrupted) as caught:
        for _, pixels in generate(plan(JOB, JOB, JOB), StoppingReporter(stop, steps), stop):
            made.append(pixels)
    assert len(made) == finished and caught.value.exit_code == 130
