"""Time of encoding captions and small images in batches relative to one by one, and of planning and encoding more."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth_core.config.resolve import resolve
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.data import encoding_batches
from diffsynth_core.planning.data.encoder_inputs import load_tokenizers
from diffsynth_core.planning.data.encoding_batches import EncodingBatches
from diffsynth_core.planning.data.encodings import with_encodings
from diffsynth_core.planning.model.loading import load_planned
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.encode import fill_cache, load_columns
from diffsynth_core.training.setup import make_accelerator
from tests.conftest import write_metadata


@pytest.fixture
def single_thread():
    """Two threads per operation are slower than one on small images, and a busy machine makes them much slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_images(folder: Path, count: int, side: int = 64) -> Path:
    """Write images of random pixels, each with a caption of its own."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    write_metadata(folder, [(f"{number}.png", f"an image, number {number}") for number in range(count)])
    return folder


def planned(base: Path, dataset: Path, work: Path) -> RunPlan:
    flags = {
        "recipe": "qwen-image-lora", "dataset_base_path": str(dataset), "dataset_num_workers": 0, "device": "cpu",
        "output_path": str(work / "out"), "cache_path": str(work / "cache"), "lora_rank": 2,
    }  # fmt: skip
    plan = make_plan(resolve(flags), SilentReporter(), base=base)
    return with_encodings(plan, SilentReporter())


def seconds_to_fill(plan: RunPlan, encoder: str) -> float:
    """Fill the cache with the encodings of one encoder."""
    chosen = tuple(part for part in plan.encodings.encoders if part.encoder.name == encoder)
    plan = replace(plan, found_encodings=replace(plan.encodings, encoders=chosen))
    family, accelerator = load_family(plan.model.facts.name), make_accelerator(plan)
    started = time.perf_counter()
    fill_cache(plan, family, accelerator, SilentReporter(), StopRequest())
    return time.perf_counter() - started


@pytest.mark.usefixtures("single_thread")
@pytest.mark.parametrize(("encoder", "limit"), [("text", 0.6), ("latents", 0.7)])
def test_batches_take_less_time_than_their_samples(encoder, limit, tiny_models, tmp_path, bench, monkeypatch):
    count = bench.size(1000, 70)
    dataset = write_images(tmp_path / "images", count)
    together = seconds_to_fill(planned(tiny_models, dataset, tmp_path / "together"), encoder)
    monkeypatch.setattr(encoding_batches, "encoded_at_once", lambda *_: 1)
    monkeypatch.setattr(encoding_batches, "captions_at_once", lambda *_: 1)
    singly = seconds_to_fill(planned(tiny_models, dataset, tmp_path / "singly"), encoder)
    detail = f"{count / together:.0f} a second, {count / singly:.0f} one by one"
    bench.at_most(f"filling the cache with {encoder}: in batches / one by one", together / singly, limit, detail)


def seconds_alone(plan: RunPlan) -> float:
    """Encode what is missing from loaded images with loaded encoders, in the same batches, and keep nothing."""
    family, seconds = load_family(plan.model.facts.name), 0.0
    for part in plan.encodings.encoders:
        samples = [
            load_columns(plan, part.encoder, plan.data.samples.samples[ref.sample], ref.choice) for ref in part.missing
        ]
        components = load_tokenizers(plan.model, family, part.encoder.component)
        components[part.encoder.component] = load_planned(
            plan.model, family, part.encoder.component, torch.float32, torch.device("cpu"), SilentReporter()
        )
        batches = EncodingBatches[int].of(family, part.encoder, components)
        started = time.perf_counter()
        with torch.no_grad():
            for index, sample in enumerate(samples):
                batches.add(index, family.tokenize(part.encoder, components, sample))
            list(batches.rest())
        seconds += time.perf_counter() - started
    return seconds


@pytest.mark.usefixtures("single_thread")
@pytest.mark.parametrize(("side", "limit"), [(64, 1.4), (128, 1.1)])
def test_encoding_takes_about_the_time_of_the_encoders(side, limit, tiny_models, tmp_path, bench):
    """The VAE takes some 10 ms for a small image and 50 ms for a larger one; those of the recipes take longer."""
    count = bench.size(2000, 20)
    plan = planned(tiny_models, write_images(tmp_path / "images", count, side), tmp_path)
    alone = seconds_alone(plan)
    filling = sum(seconds_to_fill(plan, part.encoder.name) for part in plan.encodings.encoders)
    detail = f"encoders alone {alone / count * 1000:.1f} ms an image with its caption"
    bench.at_most(f"encoding {count:,} images of {side} px / encoders alone", filling / alone, limit, detail)


@pytest.mark.long
@pytest.mark.usefixtures("single_thread")
def test_planning_and_encoding_take_time_in_proportion_to_the_images(tiny_models, tmp_path, bench):
    few, many = bench.size((500, 2000), (20, 80))
    seconds = {}
    planned(tiny_models, write_images(tmp_path / "warm", 4), tmp_path)
    for count in (few, many):
        dataset, started = write_images(tmp_path / str(count), count), time.perf_counter()
        plan = planned(tiny_models, dataset, tmp_path / f"work-{count}")
        planning = time.perf_counter() - started
        filling = sum(seconds_to_fill(plan, part.encoder.name) for part in plan.encodings.encoders)
        seconds[count] = planning, filling
    ratio = sum(seconds[many]) / (many / few * sum(seconds[few]))
    parts = ", ".join(f"{part / many * 1000:.2f} ms" for part in seconds[many])
    what = f"planning and encoding {many:,} images / {few:,}, {many // few} times"
    bench.at_most(what, ratio, 1.3, f"planning and encoding an image: {parts}")
