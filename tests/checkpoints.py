"""Checkpoints of several components, written by real rehearsals of each family."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.conftest import ENTRIES

CONTROLLED = ("--extra_inputs", "controlnet_image", "--data_file_keys", "image,controlnet_image")
QWEN_CONTROLNET = "InstantX/Qwen-Image-ControlNet-Union:diffusion_pytorch_model.safetensors"
FLUX = "black-forest-labs/FLUX.1-dev"
FLUX_FILES = ("flux1-dev.safetensors", "text_encoder/model.safetensors", "text_encoder_2/*.safetensors")
FLUX_CONTROLNET = "jasperai/Flux.1-dev-Controlnet-Upscaler:diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Rehearsed:
    """A rehearsal: its recipe and flags, what it trains in full and with LoRA, and its checkpoint."""

    family: str
    recipe: str
    flags: tuple[str, ...]
    full: tuple[str, ...]
    lora: tuple[str, ...] = ()
    file: str = "epoch-0.safetensors"


REHEARSED = {
    "qwen-image": Rehearsed(
        "qwen-image",
        "qwen-image-lora",
        (
            *("--trainable_models", "text_encoder,controlnet", *CONTROLLED),
            *("--model_id_with_origin_paths", ",".join((*ENTRIES.values(), QWEN_CONTROLNET))),
        ),
        ("text_encoder", "controlnet"),
        ("dit",),
    ),
    "flux": Rehearsed(
        "flux",
        "flux.1-dev-lora",
        (
            *("--trainable_models", "text_encoder_1,text_encoder_2,vae,controlnet", *CONTROLLED),
            *("--lora_format", "diffsynth", "--model_id_with_origin_paths"),
            ",".join((*(f"{FLUX}:{name}" for name in (*FLUX_FILES, "ae.safetensors")), FLUX_CONTROLNET)),
        ),
        ("text_encoder_1", "text_encoder_2", "vae", "controlnet"),
        ("dit",),
    ),
    "flux, nothing removed": Rehearsed(
        "flux",
        "flux.1-dev-full",
        ("--trainable_models", "dit,text_encoder_1", "--remove_prefix_in_ckpt", ""),
        ("dit", "text_encoder_1"),
    ),
    "flux2": Rehearsed(
        "flux2",
        "flux.2-klein-4b-lora",
        ("--trainable_models", "text_encoder,vae"),
        ("text_encoder", "vae"),
        ("dit",),
    ),
    "wan, nothing removed": Rehearsed(
        "wan",
        "wan2.2-ti2v-5b-lora",
        ("--trainable_models", "text_encoder,vae", "--remove_prefix_in_ckpt", ""),
        ("text_encoder", "vae"),
        ("dit",),
    ),
    "wan, image to video": Rehearsed(
        "wan", "wan2.1-i2v-14b-480p-full", ("--trainable_models", "image_encoder,dit"), ("image_encoder", "dit")
    ),
    "wan, high noise": Rehearsed("wan", "wan2.2-t2v-a14b-full", (), ("dit",), file="high/epoch-0.safetensors"),
    "wan, low noise": Rehearsed("wan", "wan2.2-t2v-a14b-full", (), ("dit",), file="low/epoch-0.safetensors"),
}


def rehearse(folder: Path) -> Callable[[str], Path]:
    """Return a function from the name of a rehearsal to its checkpoint; each is run once, in `folder`."""
    from diffsynth_cli.main import main

    @cache
    def run(recipe: str, flags: tuple[str, ...]) -> Path:
        output = folder / str(len(list(folder.iterdir())))
        short = ("--max_steps", "1", "--dataset_num_workers", "0", "--device", "cpu", "--output_path", str(output))
        code = main(["train", "--recipe", recipe, "--rehearse", *short, *flags])
        assert code == 0
        return output

    return lambda name: run(REHEARSED[name].recipe, REHEARSED[name].flags) / REHEARSED[name].file
