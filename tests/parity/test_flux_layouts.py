"""One tiny FLUX.1 in the layouts of the original, diffusers and DiffSynth-Studio: all load to the same tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from diffsynth_core.models.flux import keys
from diffsynth_core.models.flux.tiny import write_tiny_weights
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap
from diffsynth_core.weights.tensors import iterate_tensors
from tests.parity.flux_models import DIFFUSERS_PLACES, MODEL_ID, ORIGINAL_PLACES, find_files, load_files

LAYOUTS: dict[str, tuple[str, str, KeyMap]] = {
    "original transformer": ("dit", ORIGINAL_PLACES["dit"], keys.DIT_ORIGINAL),
    "transformer of diffusers": ("dit", "transformer/diffusion_pytorch_model.safetensors", SAME_NAMES),
    "transformer of DiffSynth-Studio": ("dit", "epoch-0.safetensors", keys.DIT),
    "original VAE": ("vae", ORIGINAL_PLACES["vae"], keys.VAE_ORIGINAL),
    "VAE of diffusers": ("vae", DIFFUSERS_PLACES["vae"], SAME_NAMES),
    "CLIP": ("text_encoder_1", DIFFUSERS_PLACES["text_encoder_1"], keys.CLIP),
    "CLIP without the level above": ("text_encoder_1", "text_encoder/flat.safetensors", SAME_NAMES),
    "T5": ("text_encoder_2", "text_encoder_2/model.safetensors", keys.T5),
}
"""Component, its file, and its key map."""
CLASSES = {
    "dit": FluxTransformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder_1": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
}


class Written:
    """A component with random values in every tensor, written in one layout."""

    def __init__(self, base: Path, case: str) -> None:
        self.base = base
        self.component, self.place, self.table = LAYOUTS[case]
        self.tensors = random_tensors(base / "first", self.component)
        self.in_file = {name: self.table.fuse(name, self.tensors) for name in self.table.to_sources(self.tensors)}
        self.path = base / MODEL_ID / self.place
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.in_file.items()}, self.path)
        if "/" in self.place:  # beside the original files there is no configuration
            config = (base / "first" / MODEL_ID / DIFFUSERS_PLACES[self.component]).parent / "config.json"
            (self.path.parent / "config.json").write_bytes(config.read_bytes())
        self.files = find_files(base, self.component, f"{MODEL_ID}:{self.place}")


def random_tensors(base: Path, component: str) -> dict[str, Tensor]:
    """Return random tensors by module key; biases would all be 0 and norms 1, which would hide mix-ups."""
    write_tiny_weights(base, component, MODEL_ID, DIFFUSERS_PLACES[component])
    files = find_files(base, component, f"{MODEL_ID}:{DIFFUSERS_PLACES[component]}")
    generator = torch.Generator().manual_seed(0)
    return {
        own: torch.randn(part.shape, generator=generator)
        for path in files.paths
        for name, tensor in iterate_tensors(path)
        for own, part in files.layout.names.split(name, tensor).items()
    }


@pytest.fixture(params=LAYOUTS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Written:
    return Written(tmp_path, request.param)


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    left, right = (
        {name: one for name, one in many.items() if name != "encoder.embed_tokens.weight"} for many in (left, right)
    )
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert len(left) > 10


def test_every_layout_loads_to_the_same_tensors(written):
    assert written.files.layout.names == written.table
    assert bool(written.files.config_path) == ("/" in written.place)
    assert_same(load_files(written.files).state_dict(), written.tensors)


def test_documented_and_written_names_lead_back(written):
    """The content of any layout, saved with documented or checkpoint keys, loads to the same tensors."""
    layout = written.files.layout
    for number, table in enumerate((layout.public_keys, layout.checkpoint_keys)):
        tensors = {name: table.fuse(name, written.tensors) for name in table.to_sources(written.tensors)}
        folder = written.base / f"again-{number}" / "x" / "y"
        folder.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        if written.files.config_path:
            (folder / "config.json").write_bytes(written.files.config_path.read_bytes())
        found = find_files(folder.parents[1], written.component, "x/y:model.safetensors")
        assert_same(load_files(found).state_dict(), written.tensors)
    published = {
        "dit": keys.DIT_ORIGINAL,
        "vae": keys.VAE_ORIGINAL,
        "text_encoder_1": keys.CLIP,
        "text_encoder_2": keys.T5,
    }
    assert layout.checkpoint_keys == published[written.component]
    assert layout.public_keys == (keys.DIT if written.component == "dit" else layout.checkpoint_keys)


def test_what_the_classes_save_themselves_loads(written, tmp_path):
    """A folder from `save_pretrained`, with the keys of current diffusers and transformers."""
    module = load_files(written.files)
    place = DIFFUSERS_PLACES[written.component]
    folder = (tmp_path / "saved" / "model" / place).parent
    module.save_pretrained(folder)
    again = load_files(find_files(tmp_path, written.component, f"saved/model:{folder.name}/*.safetensors"))
    assert_same(again.state_dict(), written.tensors)
    assert_same(CLASSES[written.component].from_pretrained(folder).state_dict(), written.tensors)


@pytest.mark.parametrize("written", ["original VAE"], indirect=True)
def test_the_original_vae_loads_to_what_diffusers_makes_of_it(written, tmp_path):
    folder = tmp_path / "first" / MODEL_ID / "vae"
    theirs = AutoencoderKL.from_single_file(str(written.path), config=str(folder), torch_dtype=torch.float32)
    assert_same(theirs.state_dict(), written.tensors)


@pytest.mark.parametrize("written", ["original transformer", "original VAE", "CLIP", "T5"], indirect=True)
def test_bfloat16_makes_of_each_tensor_what_diffusers_and_transformers_make(written, tmp_path):
    module: Any = load_files(written.files)
    folder = tmp_path / "saved"
    module.save_pretrained(folder)
    if written.component in ("dit", "vae"):
        theirs = CLASSES[written.component].from_pretrained(folder, torch_dtype=torch.bfloat16).state_dict()
    else:
        theirs = CLASSES[written.component].from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    ours = load_files(written.files, torch.bfloat16).state_dict()
    assert {name: tensor.dtype for name, tensor in ours.items()} == {
        name: tensor.dtype for name, tensor in theirs.items()
    }
    assert_same(ours, theirs)


def test_the_tiny_configurations_say_what_shapes_do(tmp_path):
    """A folder's config.json and the config inferred from the original file build the same module."""
    for component in ("dit", "vae"):
        modules = []
        for places in (ORIGINAL_PLACES, DIFFUSERS_PLACES):
            write_tiny_weights(tmp_path, component, MODEL_ID, places[component])
            modules.append(load_files(find_files(tmp_path, component, f"{MODEL_ID}:{places[component]}")))
        first, second = (json.loads(module.to_json_string()) for module in modules)
        assert first == second
        assert_same(modules[0].state_dict(), modules[1].state_dict())
