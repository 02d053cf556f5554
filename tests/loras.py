"""One tiny model of each family that supports LoRA, and LoRA files built for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffsynth_core.adapters.lora import LoraWeights, name_lora
from diffsynth_core.config.resolve import resolve
from diffsynth_core.hub.model_files import split_entry
from diffsynth_core.models.recognition import component_at
from diffsynth_core.models.registry import FAMILIES, load_family
from diffsynth_core.models.spec import FamilyFacts
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter

RECIPES = {
    "qwen-image": "qwen-image-lora",
    "wan": "wan2.1-t2v-1.3b-lora",
    "flux": "flux.1-dev-lora",
    "flux2": "flux.2-klein-4b-lora",
}
RANK = 4
FORMATS = [
    (family, lora_format)
    for family, facts in FAMILIES.items()
    for lora_format in ("diffsynth", "diffusers", "comfyui", "kohya")
    if facts.component(facts.denoiser).lora_naming.written(lora_format)
]
"""Every family with every format that has names for its transformer."""


@dataclass(frozen=True)
class TinyFamily:
    """A family's tiny model below `base`, and images to train it on."""

    name: str
    base: Path
    images: Path

    @property
    def facts(self) -> FamilyFacts:
        return FAMILIES[self.name]

    def flags(self, **more: Any) -> dict[str, Any]:
        """Return the parameters of a short LoRA run with a large learning rate."""
        return {
            "recipe": RECIPES[self.name], "dataset_base_path": str(self.images), "dataset_repeat": "1",
            "dataset_num_workers": "0", "height": "64", "width": "64", "max_steps": "2", "lora_rank": str(RANK),
            "learning_rate": "0.02", "device": "cpu", "lora_format": "diffsynth",
            **{name: str(value) for name, value in more.items()},
        }  # fmt: skip

    def plan(self, **more: Any) -> RunPlan:
        return make_plan(resolve(self.flags(**more)), SilentReporter(), base=self.base)

    def module_shapes(self, component: str = "dit", **more: Any) -> dict[str, tuple[int, ...]]:
        """Return the weight shapes of the documented target modules, by documented name."""
        from diffsynth_core.models.loading import module_shapes

        plan = self.plan(output_path="unused", **more)
        files = plan.model.components[component]
        shapes = files.layout.public_shapes(module_shapes(files))
        return {name: shapes[f"{name}.weight"] for name in plan.training.lora_modules}


def write_tiny_family(name: str, base: Path) -> None:
    """Write the files in the recipe of a family."""
    facts = FAMILIES[name]
    for entry in resolve({"recipe": RECIPES[name]}).parameters.model_id_with_origin_paths:
        model_id, pattern = split_entry(entry)
        component = component_at(pattern, facts)
        load_family(name).write_tiny_weights(base, component.name, model_id, pattern)


def write_images(folder: Path, photographs: Path) -> None:
    """Write the photographs with the columns of image and video models."""
    rows = ["image,video,prompt"]
    for image in sorted(photographs.glob("*.png")):
        (folder / image.name).write_bytes(image.read_bytes())
        rows.append(f"{image.name},{image.name},a photograph of {image.stem}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")


def random_lora(
    shapes: Mapping[str, tuple[int, ...]], rank: int = RANK, seed: int = 0, spread: float = 0.1
) -> dict[str, LoraWeights]:
    """Return random lora_A and lora_B for modules of these weight shapes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * spread

    return {
        module: LoraWeights(draw(rank, *shape[1:]), draw(shape[0], rank, *[1] * len(shape[2:])))
        for module, shape in shapes.items()
    }


def save_lora(
    path: Path, weights: Mapping[str, LoraWeights], family: str, lora_format: str, alpha: float | None = None
) -> Path:
    """Save a LoRA file for a family's transformer, with `alpha` for each of its modules if given."""
    facts = FAMILIES[family]
    tensors = name_lora(weights, lora_format, facts.component(facts.denoiser).lora_naming)
    if alpha is not None:
        ends = (".lora_down.weight", ".lora_A.weight")
        stems = [key.removesuffix(end) for key in tensors for end in ends if key.endswith(end)]
        tensors |= {f"{stem}.alpha": torch.tensor(float(alpha)) for stem in stems}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)
    return path
