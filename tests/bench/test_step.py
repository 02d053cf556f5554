"""Time of a training step relative to a bare PyTorch loop with the same model, samples and optimizer, in one
process.
"""

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from diffsynth_core.config.resolve import resolve
from diffsynth_core.models.qwen_image.tiny import TinySizes, write_tiny_weights
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.data.encodings import with_encodings
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.loop import train
from diffsynth_core.training.model import build_training_module
from diffsynth_core.training.objective import FlowMatching
from diffsynth_core.training.setup import make_optimizer
from tests.conftest import MODEL_ID, PLACES
from tests.shapes.datasets import scene_rows, write_dataset
from tests.shapes.scenes import draw_scenes

ROUNDS = 5
WARM_UP = 5
TINY_BATCH = 64


def test_a_step_takes_at_most_1_03_of_a_bare_loop(tiny_models, photographs, tmp_path, bench):
    write_tiny_weights(tmp_path / "models", "dit", MODEL_ID, PLACES["dit"], TinySizes(blocks=4, heads=4, head_size=64))
    for component in ("text_encoder", "vae"):
        write_tiny_weights(tmp_path / "models", component, MODEL_ID, PLACES[component])
    ratios = []
    steps = bench.size(60, WARM_UP + 1)
    for number in range(bench.rounds(ROUNDS)):
        ours = _our_steps(_plan(tmp_path, photographs, f"run-{number}", steps))
        bare = _bare_steps(_plan(tmp_path, photographs, f"bare-{number}", steps))
        ratios.append(ours / bare)
    detail = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    bench.at_most("a training step / a bare PyTorch loop", statistics.median(ratios), 1.03, detail)


def test_a_step_of_the_tiny_model_takes_at_most_1_15_of_a_bare_loop(tmp_path, bench):
    scenes = tmp_path / "scenes"
    write_dataset(scenes, scene_rows(draw_scenes(TINY_BATCH, seed=0)))
    ratios = []
    steps = bench.size(60, WARM_UP + 1)
    for number in range(bench.rounds(ROUNDS)):
        ours, bare = (_shapes_plan(tmp_path, scenes, f"{kind}-{number}", steps) for kind in ("run", "bare"))
        ratios.append(_our_steps(ours) / _bare_steps(bare))
    detail = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    bench.at_most("a step of shapes-full at batch 64 / a bare loop", statistics.median(ratios), 1.15, detail)


WATCHED = {
    "previews": {"preview_prompts": "a red circle on blue", "preview_every": "20", "preview_steps": "4"},
    "trackers": {"log_with": "csv,tensorboard"},
    "averages": {"ema_decay": "0.99"},
}
"""What makes a run easier to follow, by parameters."""


@pytest.mark.parametrize("name", WATCHED)
def test_a_step_is_not_slower_because_the_run_can_be_followed(name, tmp_path, bench):
    scenes = tmp_path / "scenes"
    write_dataset(scenes, scene_rows(draw_scenes(TINY_BATCH, seed=0)))
    ratios = []
    steps = bench.size(60, WARM_UP + 1)
    for number in range(bench.rounds(ROUNDS)):
        without, given = (
            _our_steps(_shapes_plan(tmp_path, scenes, f"{kind}-{number}", steps, flags))
            for kind, flags in (("without", {}), ("with", WATCHED[name]))
        )
        ratios.append(given / without)
    detail = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    bench.at_most(f"a step of shapes-full at batch 64 with {name} / without", statistics.median(ratios), 1.02, detail)


def _plan(tmp_path: Path, photographs: Path, output: str, steps: int) -> RunPlan:
    flags = {
        "recipe": "qwen-image-lora", "dataset_base_path": str(photographs), "dataset_num_workers": "0", "batch_size": "4",
        "max_steps": str(steps), "output_path": str(tmp_path / output), "use_gradient_checkpointing": False,
    }  # fmt: skip
    return make_plan(resolve(flags), SilentReporter(), base=tmp_path / "models")


def _shapes_plan(
    tmp_path: Path, scenes: Path, output: str, steps: int, flags: Mapping[str, str] = MappingProxyType({})
) -> RunPlan:
    given = {
        "recipe": "shapes-full", "dataset_base_path": str(scenes), "max_steps": str(steps), "num_epochs": str(steps),
        "save_steps": str(steps), "output_path": str(tmp_path / output), "device": "cpu", **flags,
    }  # fmt: skip
    return make_plan(resolve(given), SilentReporter(), base=tmp_path / "models")


def _our_steps(plan: RunPlan) -> float:
    """Return the median seconds of a step as recorded in the metrics: from fetching to the end of the optimizer
    step.
    """
    train(plan, SilentReporter(), StopRequest())
    lines = (plan.parameters.output_path / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["seconds"] for line in lines[WARM_UP:])


def _bare_steps(plan: RunPlan) -> float:
    """Return the median seconds of a step of the plainest loop: one batch in memory, global noise, no bookkeeping."""
    family = load_family("qwen-image")
    plan = with_encodings(plan, SilentReporter())
    model = build_training_module(plan, family, torch.device("cpu"), SilentReporter())
    encoded = [
        {name: tensor for part in plan.encodings.encoders for name, tensor in part.cache.read(part.key(sample)).items()}
        for sample in range(plan.parameters.batch_size)
    ]
    batch = family.collate(encoded)
    parameters = list(model.trained().values())
    optimizer = make_optimizer(plan, model.trained())
    components = dict(model.components.items())
    objective = model.objective
    assert isinstance(objective, FlowMatching)
    seconds = []
    for _ in range(plan.data.steps.total_steps):
        started = time.perf_counter()
        noise = torch.randn_like(batch["latents"])
        index = torch.randint(0, 1000, (len(encoded),))
        sigma = objective.sigmas[index]
        spread = sigma.view(-1, 1, 1, 1, 1)
        prediction = family.predict_velocity(components, (1 - spread) * batch["latents"] + spread * noise, sigma, batch)
        loss = ((prediction - (noise - batch["latents"])).pow(2).flatten(1).mean(1) * objective.weights[index]).mean()
        loss.backward()
        torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:])
