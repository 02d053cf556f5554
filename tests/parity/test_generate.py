"""Generated pixels against those of diffusers' pipelines, float32, tiny weights, the same files, prompts and seeds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.pipelines.flux import pipeline_flux_controlnet, pipeline_flux_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_controlnet
from PIL import Image
from torch import Tensor

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import collect_problems
from diffsynth_core.generation.generate import draw
from diffsynth_core.generation.generation_plan import GenerationPlan
from diffsynth_core.models.family import Family
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.spec import match_targets, modules_with_weights
from diffsynth_core.models.wan.sampling import T2V_2_2
from diffsynth_core.models.wan.spec import WAN
from diffsynth_core.planning.drawing.jobs import AppliedLora, GenerationJob
from diffsynth_core.planning.model.components import find_components
from diffsynth_core.planning.model.lora_files import read_lora_of, tensor_shapes
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.planning.plan import Machine
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from tests.conftest import ENTRIES
from tests.covering import long_ones
from tests.loras import random_lora, save_lora
from tests.parity import controlnet_models, flux2_models, flux_models, qwen_edit_models, wan_models
from tests.parity.loras import load_into
from tests.parity.models import FEW_PIXELS
from tests.parity.numbers import difference
from tests.parity.photographs import photograph

TOLERANCE = 1e-4
"""Of pixels in [0, 1]."""
PROMPT, NEGATIVE = "an astronaut before a flag", "blurry, a cat"
QWEN_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}
FLUX_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
"""The published scheduler configurations."""
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
"""Warning of diffusers' own `FluxControlNetModel`."""


@dataclass(frozen=True)
class Case:
    """A model, what is asked of it, and how its pipeline is asked.

    `shown`: extra input -> images as files. `guided`, `unguided`: arguments of the pipeline.
    """

    base: Path
    entries: tuple[str, ...]
    pipeline: Any
    size: tuple[int, int]
    shown: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    named: Mapping[str, Any] = field(default_factory=dict)
    guided: Mapping[str, Any] = field(default_factory=dict)
    unguided: Mapping[str, Any] = field(default_factory=dict)
    frames: int = 1
    steps: int = 2
    guidance: float | None = None
    cfg_scale: float = 4.0
    negative: str = NEGATIVE

    @property
    def job(self) -> GenerationJob:
        """Guided generation."""
        height, width = self.size
        return GenerationJob(
            prompt=PROMPT,
            negative_prompt=self.negative,
            seed=7,
            steps=self.steps,
            cfg_scale=self.cfg_scale,
            guidance=self.guidance,
            height=height,
            width=width,
            num_frames=self.frames,
            images=self.shown,
        )

    def model(self) -> ModelPlan:
        parameters = Parameters(model_id_with_origin_paths=self.entries, extra_inputs=tuple(self.shown))
        with collect_problems() as problems:
            found = find_components(parameters, None, self.base)
        assert found and not problems, problems
        return found


def plan_of(model: ModelPlan, cache: Path, *jobs: GenerationJob) -> GenerationPlan:
    machine = Machine(device="cpu", mixed_precision="no")
    return GenerationPlan(model=model, machine=machine, jobs=jobs, cache=cache, max_pixels=FEW_PIXELS)


def drawn(plan: GenerationPlan) -> list[Tensor]:
    """Return the pixels of all jobs, `[3, F, H, W]`."""
    return [pixels for _, pixels in draw(plan, SilentReporter(), StopRequest())]


@torch.no_grad()
def expected(case: Case, job: GenerationJob, **named: Any) -> Tensor:
    """Return the pixels of the pipeline, `[3, F, H, W]`."""
    case.pipeline.set_progress_bar_config(disable=True)
    clip = {"num_frames": job.num_frames} if case.frames > 1 else {}
    (pixels,) = case.pipeline(
        prompt=job.prompt, height=job.height, width=job.width, num_inference_steps=job.steps, output_type="pt",
        return_dict=False, generator=torch.Generator("cpu").manual_seed(job.seed), **clip, **case.named, **named,
    )  # fmt: skip
    return pixels[0].transpose(0, 1) if case.frames > 1 else pixels[0][:, None]


def saved(folder: Path, name: str, size: tuple[int, int] | None = None) -> Path:
    """Write a photograph, at (height, width)."""
    folder.mkdir(exist_ok=True)
    path, image = folder / f"{name}.png", photograph(name)
    (image if size is None else image.resize(size[::-1], Image.Resampling.LANCZOS)).save(path)
    return path


# Cases: (request, folder for images) -> Case


def qwen_image(request: pytest.FixtureRequest, folder: Path) -> Case:
    pipeline = request.getfixturevalue("pipeline")
    base = request.getfixturevalue("tiny_models")
    return qwen_case(base, tuple(ENTRIES.values()), pipeline)


def qwen_case(base: Path, entries: tuple[str, ...], pipeline: Any, **more: Any) -> Case:
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(QWEN_SCHEDULER)
    guided = {"true_cfg_scale": 4.0, "negative_prompt": NEGATIVE}
    # Of two steps, both have sigmas that the shift does not move: 1, and `shift_terminal`.
    return Case(base, entries, pipeline, (64, 96), steps=3, guided=guided, unguided={"true_cfg_scale": 1.0}, **more)


def qwen_edit(name: str, request: pytest.FixtureRequest, folder: Path) -> Case:
    pair = request.getfixturevalue("edit_pairs")(name)
    qwen_edit_models.shrink_published_areas(request.getfixturevalue("monkeypatch"))
    entries = tuple(pair.kind.entries.values())
    base = request.getfixturevalue("edit_models")
    shown = tuple(saved(folder, image) for image in pair.kind.images)
    images = pair.images[0] if len(pair.images) == 1 else pair.images
    return qwen_case(base, entries, pair.pipeline, shown={"edit_image": shown}, named={"image": images})


def controlnet(name: str, request: pytest.FixtureRequest, folder: Path) -> Case:
    kind, base = controlnet_models.KINDS[name], request.getfixturevalue("tmp_path") / "models"
    controlnet_models.write_models(base, kind)
    for module in (pipeline_qwenimage_controlnet, pipeline_flux_controlnet):  # they sample from the posterior
        monkeypatch = request.getfixturevalue("monkeypatch")
        monkeypatch.setattr(module, "retrieve_latents", lambda posterior, generator=None: posterior.latent_dist.mode())
    entries = tuple(f"{kind.model_id}:{place}" for place in kind.places.values())
    pipeline = controlnet_models.load_pipeline(base, kind)
    path = saved(folder, "coffee", (64, 96))
    more = {"shown": {"controlnet_image": (path,)}, "named": {"control_image": Image.open(path)}}
    if kind.family == "qwen-image":
        return qwen_case(base, entries, pipeline, **more)
    return flux_case(base, entries, pipeline, 3.5, **more)


def flux_case(base: Path, entries: tuple[str, ...], pipeline: Any, guidance: float, **more: Any) -> Case:
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(FLUX_SCHEDULER)
    unguided = {"guidance_scale": guidance}
    guided = {**unguided, "true_cfg_scale": 2.0, "negative_prompt": NEGATIVE}
    return Case(
        base, entries, pipeline, (64, 96), guidance=guidance, cfg_scale=2.0, guided=guided, unguided=unguided, **more
    )


def flux(name: str, guidance: float, request: pytest.FixtureRequest, folder: Path) -> Case:
    pair = request.getfixturevalue("flux_pairs")(name)
    entries = tuple(f"{flux_models.MODEL_ID}:{place}" for place in flux_models.ORIGINAL_PLACES.values())
    base = request.getfixturevalue("flux_models")
    if not pair.shown:
        return flux_case(base, entries, pair.pipeline, guidance)
    shrink_kontext(request.getfixturevalue("monkeypatch"))
    shown = {"kontext_images": tuple(saved(folder, image) for image in pair.kind.shown)}
    named = {"image": pair.shown[0], "max_area": 64 * 96}
    return flux_case(base, entries, pair.pipeline, guidance, shown=shown, named=named)


def shrink_kontext(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pipeline resize reference images to a 64th of their area."""
    sizes = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    shrunk = [(width // 8 // 16 * 16, height // 8 // 16 * 16) for width, height in sizes]
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", shrunk)


def klein(images: int, request: pytest.FixtureRequest, folder: Path) -> Case:
    """Classifier-free guidance is of the base model alone, and has the empty negative prompt."""
    pair = request.getfixturevalue("flux2_pairs")("base 9B")
    entries = tuple(flux2_models.entries_of("base 9B").values())
    sizes = dict(zip(("coffee", "rocket"), flux2_models.REFERENCE_SIZES, strict=True))
    paths = tuple(saved(folder, name, size) for name, size in list(sizes.items())[:images])
    more: dict[str, Any] = {"negative": "", "guided": {"guidance_scale": 4.0}, "unguided": {"guidance_scale": 1.0}}
    if images:
        more |= {"shown": {"edit_image": paths}, "named": {"image": [Image.open(path) for path in paths]}}
    return Case(request.getfixturevalue("flux2_models"), entries, pair.pipeline, flux2_models.SIZE, **more)


def wan(name: str, shift: float, request: pytest.FixtureRequest, folder: Path) -> Case:
    pair = request.getfixturevalue("wan_pairs")(name)
    pair.pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    size = pair.kind.size
    photographs = dict(zip(pair.kind.shown, ("astronaut", "coffee"), strict=False))
    shown = {image: (saved(folder, name, size),) for image, name in photographs.items()}
    parameters = {"input_image": "image", "end_image": "last_image"}
    named = {parameters[image]: Image.open(path) for image, (path,) in shown.items()}
    return Case(
        request.getfixturevalue("wan_models"), tuple(pair.kind.entries.values()), pair.pipeline, size, shown, named,
        guided={"guidance_scale": 4.0, "negative_prompt": NEGATIVE}, unguided={"guidance_scale": 1.0},
        frames=5, steps=3,  # so that one is of the second order
    )  # fmt: skip


CASES: dict[str, Callable[[pytest.FixtureRequest, Path], Case]] = {
    "Qwen-Image": qwen_image,
    "Qwen-Image-Edit": partial(qwen_edit, "Edit"),
    "Qwen-Image-Edit-2509, two images": partial(qwen_edit, "2509, two images"),
    "Qwen-Image-Edit-2511, two images": partial(qwen_edit, "2511, two images"),
    "Qwen-Image ControlNet": partial(controlnet, "Qwen-Image"),
    "FLUX.1": partial(flux, "FLUX.1", 3.5),
    "FLUX.1 Kontext": partial(flux, "Kontext", 2.5),
    "FLUX.1 ControlNet": partial(controlnet, "FLUX.1"),
    "FLUX.2 klein": partial(klein, 0),
    "FLUX.2 klein, two images": partial(klein, 2),
    "Wan 2.1 T2V": partial(wan, "T2V", 3.0),
    "Wan 2.1 I2V": partial(wan, "I2V 2.1", 3.0),
    "Wan 2.1 FLF2V": partial(wan, "FLF2V", 16.0),
    "Wan 2.2 I2V": partial(wan, "I2V 2.2", 5.0),
    "Wan 2.2 I2V, two images": partial(wan, "I2V 2.2, two images", 5.0),
    "Wan 2.2 TI2V, text": partial(wan, "TI2V, text", 5.0),
    "Wan 2.2 TI2V, image": partial(wan, "TI2V, image", 5.0),
}


NEARLY_OTHERS = (
    "Qwen-Image-Edit",
    "Qwen-Image-Edit-2511, two images",
    "FLUX.2 klein",
    "Wan 2.1 FLF2V",
    "Wan 2.2 I2V, two images",
    "Wan 2.2 TI2V, text",
)


@pytest.mark.parametrize("name", long_ones(CASES, long=NEARLY_OTHERS))
def test_pixels_are_those_of_the_pipeline(name, request, tmp_path):
    case = CASES[name](request, tmp_path / "images")
    alone = replace(case.job, cfg_scale=1.0)
    guided, unguided = drawn(plan_of(case.model(), tmp_path / "cache", case.job, alone))
    wanted, wanted_alone = expected(case, case.job, **case.guided), expected(case, alone, **case.unguided)
    worst = max(difference(guided, wanted), difference(unguided, wanted_alone))
    effect = difference(wanted, wanted_alone)
    print(f"off by {worst:.1e}, spread {wanted.std():.2f}, guidance moves a pixel by {effect:.2f}")
    assert guided.shape == (3, case.frames, *case.size)
    assert wanted.std() > 0.05 and effect > 10 * TOLERANCE, "there is something to compare"
    assert worst < TOLERANCE


@pytest.mark.parametrize("name", ["Qwen-Image", "FLUX.1"])
def test_a_controlnet_runs_once_in_a_step_with_both_prompts(name, request, monkeypatch, tmp_path):
    case = controlnet(name, request, tmp_path / "images")
    case.named["control_image"].close()  # no pipeline reads it
    family, plan, calls = load_family(case.model().facts.name), plan_of(case.model(), tmp_path / "cache", case.job), []
    (once,) = drawn(plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(family), "shared_by_prompts", Family.shared_by_prompts)
        (twice,) = drawn(plan)
    assert torch.equal(once, twice)
    module = type(case.pipeline.controlnet)
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *given, **named: (calls.append(1), forward(*given, **named))[1])
    drawn(plan)
    assert len(calls) == case.steps


def test_two_denoisers_share_the_steps_as_in_the_pipeline(request, tmp_path):
    """Wan 2.2 A14B: the first transformer at high noise, the second one with a scale of its own at low noise."""
    case = wan("T2V", 12.0, request, tmp_path / "images")
    second = WanTransformer3DModel.from_config(case.pipeline.transformer.config)
    second.load_state_dict({name: 1.1 * value for name, value in case.pipeline.transformer.state_dict().items()})
    second.save_pretrained(tmp_path / "models" / "Wan-AI" / "Wan2.2-T2V-A14B" / "transformer_2")
    pipeline = WanPipeline(**{**case.pipeline.components, "transformer_2": second}, boundary_ratio=0.875)
    found = case.model()
    low = wan_models.find_files(tmp_path / "models", "dit", "Wan-AI/Wan2.2-T2V-A14B:transformer_2/*.safetensors")
    components = {**found.components, WAN.second_denoiser: low}
    model = replace(found, components=components, variant=replace(found.variant, sampling=T2V_2_2))
    job = replace(case.job, second_cfg_scale=3.0)
    first, alone = drawn(plan_of(model, tmp_path / "cache", job, replace(job, seed=8, steps=4)))
    asked = replace(case, pipeline=pipeline, guided={**case.guided, "guidance_scale_2": 3.0})
    wanted = expected(asked, job, **asked.guided)
    assert difference(first, wanted) < TOLERANCE
    assert difference(wanted, expected(case, job, **case.guided)) > 10 * TOLERANCE, "the second one has a say"
    assert difference(alone, expected(asked, replace(job, seed=8, steps=4), **asked.guided)) < TOLERANCE


@pytest.mark.parametrize(
    "name", long_ones(("Qwen-Image", "FLUX.1", "FLUX.2 klein", "Wan 2.1 T2V"), long=("Qwen-Image", "FLUX.1"))
)
def test_a_lora_draws_what_it_draws_in_the_pipeline(name, request, tmp_path):
    case = CASES[name](request, tmp_path / "images")
    model, weight = case.model(), 0.7
    facts = model.facts.component(model.facts.denoiser)
    shapes = tensor_shapes(facts.name, model)
    targets = match_targets(modules_with_weights(shapes), facts.lora_targets).values()
    modules = {module: shapes[f"{module}.weight"] for found in targets for module in found}
    path = save_lora(tmp_path / "lora.safetensors", random_lora(modules), model.facts.name, "diffusers")
    lora = AppliedLora(lora=read_lora_of(path, facts.name, model), component=facts.name, weight=weight, shapes=shapes)
    job = replace(case.job, cfg_scale=1.0)
    with_lora, without = drawn(plan_of(model, tmp_path / "cache", replace(job, adapters=(lora,)), job))
    assert difference(without, expected(case, job, **case.unguided)) < TOLERANCE
    load_into(case.pipeline, path)
    case.pipeline.set_adapters("trained", weight)
    wanted = expected(case, job, **case.unguided)
    case.pipeline.unload_lora_weights()
    off, moved = difference(with_lora, wanted), difference(with_lora, without)
    print(f"off by {off:.1e}, the LoRA moves a pixel by {moved:.2f}")
    assert off < TOLERANCE and moved > 10 * TOLERANCE
