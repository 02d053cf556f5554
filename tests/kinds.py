"""Each variant by its recipe: tiny models, datasets, and the flags that name them."""

import csv
import shutil
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.config.recipes import load_recipe
from diffsynth_core.models.recognition import component_at
from diffsynth_core.models.registry import FAMILIES, load_family
from tests.clips import detailed, write_clip
from tests.conftest import CAPTIONS

CLIPS = ("--height", 64, "--width", 96, "--num_frames", 9)
SMALL = ("--max_pixels", 256 * 256)
"""Flag for small reference images, which are resized to 1024 x 1024 pixels by default."""


@dataclass(frozen=True)
class Kind:
    """A variant: the recipe that names its files, its dataset, and flags of both stages of two-stage training."""

    recipe: str
    data: str = "images"
    sizes: tuple[object, ...] = ()
    encoders: tuple[str, ...] = ("text", "latents")
    components: tuple[str, ...] = ("text_encoder", "vae")


KINDS = {
    "qwen-image": Kind("qwen-image-lora"),
    "qwen-edit": Kind("qwen-image-edit-lora", "edits", SMALL, ("edit_text", "latents", "edit_latents")),
    "qwen-edit-2509": Kind("qwen-image-edit-2509-lora", "edits", SMALL, ("edit_plus_text", "latents", "edit_latents")),
    "flux": Kind(
        "flux.1-dev-lora",
        encoders=("text_1", "text_2", "latents"),
        components=("text_encoder_1", "text_encoder_2", "vae"),
    ),
    "flux2": Kind("flux.2-klein-base-4b-lora"),
    "wan-t2v": Kind("wan2.1-t2v-1.3b-lora", "clips", CLIPS),
    "wan-i2v": Kind(
        "wan2.1-i2v-14b-480p-lora",
        "clips",
        CLIPS,
        ("text", "latents_with_condition", "image"),
        ("text_encoder", "vae", "image_encoder"),
    ),
    "wan-ti2v": Kind("wan2.2-ti2v-5b-lora", "clips", CLIPS, ("text", "latents_with_first_given")),
}


def entries_of(recipe: str) -> list[str]:
    """Return the model entries of a recipe, the transformer's first."""
    (layer,) = [layer for layer in load_recipe(recipe).layers if "model_id_with_origin_paths" in layer.parameters][-1:]
    entries = list(layer.parameters["model_id_with_origin_paths"])
    return sorted(entries, key=lambda entry: component_of(recipe, entry) != "dit")


def component_of(recipe: str, entry: str) -> str:
    return component_at(entry.partition(":")[2], FAMILIES[load_recipe(recipe).family]).name


def write_models(base: Path) -> Path:
    """Write tiny models of every variant below a model base path."""
    written = set()
    for recipe in {kind.recipe for kind in KINDS.values()}:
        for entry in entries_of(recipe):
            model_id, _, place = entry.partition(":")
            if entry not in written:
                family = load_family(load_recipe(recipe).family)
                family.write_tiny_weights(base, component_of(recipe, entry), model_id, place)
                written.add(entry)
    return base


SAMPLING = {"seed": ("7", "8", "9", "10"), "rand_device": ("cpu",) * 4, "num_inference_steps": ("4", "4", "4", "3")}
SAMPLING |= {"cfg_scale": ("1", "1.0", "1", "1")}
"""What direct distillation reads of the rows."""


def write_datasets(folder: Path, photographs: Path) -> dict[str, Path]:
    """Write photographs of two shapes, the same with reference images, and clips of two lengths, with sampler
    columns.
    """
    import skimage.data
    from PIL import Image

    images, edits, clips = (folder / name for name in ("images", "edits", "clips"))
    shutil.copytree(photographs, images)
    Image.fromarray(skimage.data.coffee()).resize((96, 64)).save(images / "coffee.png")
    shutil.copytree(images, edits)
    clips.mkdir()
    frames = {"a.mp4": 9, "b.mov": 9, "c.mkv": 5}
    for name, count in frames.items():
        write_clip(clips / name, detailed(count, 64, 96))
    names = [f"{name}.png" for name in CAPTIONS]
    _write_rows(images, {"image": names, "prompt": list(CAPTIONS.values())})
    _write_rows(edits, {"image": names, "prompt": list(CAPTIONS.values()), "edit_image": ["chelsea.png"] * len(names)})
    _write_rows(clips, {"video": list(frames), "prompt": ["one", "two and three", "short"]})
    return {"images": images, "edits": edits, "clips": clips}


def _write_rows(folder: Path, columns: dict[str, list[str]]) -> None:
    rows = zip(*columns.values(), *SAMPLING.values(), strict=False)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([[*columns, *SAMPLING], *rows])


def lora(kind: Kind) -> tuple[object, ...]:
    (targets,) = [
        component.lora_targets
        for component in FAMILIES[load_recipe(kind.recipe).family].components
        if component.lora_targets
    ]
    return (
        "--lora_base_model",
        "dit",
        "--lora_target_modules",
        ",".join(targets),
        "--remove_prefix_in_ckpt",
        "pipe.dit.",
    )


def inputs_of(kind: Kind) -> tuple[object, ...]:
    """Return the extra inputs of a variant, and the columns that it reads."""
    columns = {"edits": ("--extra_inputs", "edit_image", "--data_file_keys", "image,edit_image")}
    shown = ("--extra_inputs", "input_image") if "input_image" in str(load_recipe(kind.recipe).layers) else ()
    return columns.get(kind.data, shown)
