"""One tiny Wan model in Wan's own layout and in diffusers': every component loads to the same tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from diffsynth_core.models.registry import load_family
from diffsynth_core.models.wan import keys
from diffsynth_core.models.wan.spec import CONVERTED
from diffsynth_core.weights.key_maps import SAME_NAMES
from diffsynth_core.weights.tensors import iterate_tensors
from tests.parity.wan_models import DIFFUSERS_PLACES, KINDS, find_files, load_files

DIT = "diffusion_pytorch_model.safetensors"
CASES = {
    "transformer of T2V": ("T2V", "dit", DIT),
    "transformer of I2V 2.1": ("I2V 2.1", "dit", DIT),
    "transformer of FLF2V": ("FLF2V", "dit", DIT),
    "transformer of I2V 2.2": ("I2V 2.2", "dit", DIT),
    "transformer of TI2V": ("TI2V, text", "dit", DIT),
    "text encoder": ("T2V", "text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
    "VAE 2.1": ("T2V", "vae", "Wan2.1_VAE.pth"),
    "VAE 2.2": ("TI2V, text", "vae", "Wan2.2_VAE.pth"),
    "image encoder": ("I2V 2.1", "image_encoder", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"),
}
"""Variant, component, and its file in Wan's own layout."""
PICKLED = [case for case, (*_, place) in CASES.items() if place.endswith(".pth")]


class OwnFile:
    """A component written in Wan's own layout."""

    def __init__(self, base: Path, case: str) -> None:
        kind, self.component, place = CASES[case]
        self.base, self.model_id = base, KINDS[kind].model_id
        self.entry = f"{self.model_id}:{place}"
        self.path = base / self.model_id / place
        load_family("wan").write_tiny_weights(base, self.component, self.model_id, place)
        randomise(self.path)
        self.files = find_files(base, self.component, self.entry)
        self.module = load_files(self.files)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(iterate_tensors(self.path))

    @property
    def in_module_names(self) -> dict[str, Tensor]:
        """Return its tensors, renamed and split by the key map."""
        table = self.files.layout.names
        return {
            own: part.contiguous()
            for name, tensor in self.tensors.items()
            for own, part in table.split(name, tensor).items()
        }

    def write_folder(self, base: Path) -> str:
        """Write it as a folder of a diffusers repository with the keys of the map; return its entry."""
        model_id = f"{self.model_id}-Diffusers"
        place = DIFFUSERS_PLACES[self.component].replace("*", "")
        folder = (base / model_id / place).parent
        folder.mkdir(parents=True)
        table = keys.IMAGE_ENCODER_DIFFUSERS if self.component == "image_encoder" else SAME_NAMES
        renamed = {table.to_source(name): tensor for name, tensor in self.in_module_names.items()}
        save_file({str(name): tensor for name, tensor in renamed.items()}, base / model_id / place)
        config: Any = self.module.config
        content = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
        return f"{model_id}:{place}"


@pytest.fixture(scope="module", params=CASES)
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OwnFile:
    return OwnFile(tmp_path_factory.mktemp("own"), request.param)


def randomise(path: Path) -> None:
    """Make all tensors of a file differ: biases would all be 0 and norms 1, which would hide mix-ups."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype) for name, tensor in iterate_tensors(path)
    }
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert len(left) > 10


def test_both_layouts_load_to_the_same_tensors(own, tmp_path):
    entry = own.write_folder(tmp_path)
    files = find_files(tmp_path, own.component, entry)
    assert files.layout is not own.files.layout
    assert files.config_path
    assert_same(load_files(files).state_dict(), own.module.state_dict())


def test_the_table_leads_back_to_the_file(own, tmp_path):
    """The content of the folder, with documented keys, equals Wan's own file."""
    entry = own.write_folder(tmp_path)
    files = find_files(tmp_path, own.component, entry)
    parts = {
        name: part
        for path in files.paths
        for key, tensor in iterate_tensors(path)
        for name, part in files.layout.names.split(key, tensor).items()
    }
    public_keys = files.layout.public_keys
    joined = {name: public_keys.fuse(name, parts) for name in {public_keys.to_source(part): 0 for part in parts}}
    unneeded = ("visual.head", "textual.", "log_scale")
    assert_same(joined, {name: tensor for name, tensor in own.tensors.items() if not name.startswith(unneeded)})


@pytest.mark.parametrize("own", PICKLED, indirect=True)
def test_the_converted_file_is_read_in_place_of_the_pickled_one(own, tmp_path):
    copy = tmp_path / CONVERTED / own.path.with_suffix(".safetensors").name
    copy.parent.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in own.tensors.items()}, copy)
    files = find_files(tmp_path, own.component, own.entry)
    assert files.paths == (copy,)
    assert CONVERTED in files.origin
    assert_same(load_files(files).state_dict(), own.module.state_dict())


def test_what_the_classes_save_themselves_loads(own, tmp_path):
    """A folder from `save_pretrained`, with the keys of current diffusers and transformers."""
    place = DIFFUSERS_PLACES[own.component].replace("*", "")
    own.module.save_pretrained((tmp_path / "saved" / "model" / place).parent)
    module = load_files(find_files(tmp_path, own.component, f"saved/model:{place}"))
    assert_same(module.state_dict(), own.module.state_dict())
    read_back = type(own.module).from_pretrained((tmp_path / "saved" / "model" / place).parent)
    assert_same(read_back.state_dict(), module.state_dict())


@pytest.mark.parametrize(
    "own", ["transformer of T2V", "transformer of I2V 2.1", "transformer of I2V 2.2", "VAE 2.1"], indirect=True
)
def test_wans_own_file_loads_to_what_diffusers_makes_of_it(own, tmp_path):
    """Only for components for which diffusers has a conversion of its own."""
    folder = find_files(tmp_path, own.component, own.write_folder(tmp_path)).paths[0].parent
    loader = WanTransformer3DModel if own.component == "dit" else AutoencoderKLWan
    theirs = loader.from_single_file(str(own.path), config=str(folder), torch_dtype=torch.float32)
    assert_same(own.module.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(
    "places",
    [
        (f"high_noise_model/{DIT}", f"low_noise_model/{DIT}"),
        (f"transformer/{DIT}", f"transformer_2/{DIT}"),
    ],
    ids=["own", "diffusers"],
)
def test_two_experts_are_two(places, tmp_path):
    model_id = "Wan-AI/Wan2.2-T2V-A14B"
    experts = []
    for place in places:
        load_family("wan").write_tiny_weights(tmp_path, "dit", model_id, place)
        experts.append(load_files(find_files(tmp_path, "dit", f"{model_id}:{place}")).state_dict())
    first, second = experts
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first if name.endswith("to_q.weight"))


@pytest.mark.parametrize("case", ["transformer of I2V 2.1", "transformer of TI2V"])
def test_bfloat16_leaves_in_float32_what_diffusers_leaves(case, tmp_path):
    """Norms, modulation tables and the time embedder stay float32 in both loaders."""
    own = OwnFile(tmp_path, case)
    folder = tmp_path / own.write_folder(tmp_path).replace(":", "/")
    theirs = WanTransformer3DModel.from_pretrained(folder.parent, torch_dtype=torch.bfloat16).state_dict()
    ours = load_files(own.files, torch.bfloat16).state_dict()
    assert {name: tensor.dtype for name, tensor in ours.items()} == {
        name: tensor.dtype for name, tensor in theirs.items()
    }
    assert_same(ours, theirs)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32, torch.bfloat16}
