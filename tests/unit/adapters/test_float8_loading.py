"""Loading into 8-bit floats: which weights, how many bytes, what keeps its dtype, and files already in 8-bit floats."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_core.adapters.stored import StoredLinear
from diffsynth_core.models import loading
from diffsynth_core.models.loading import build_empty, load_component, shape_problems, stored_dtypes
from diffsynth_core.models.recognition import recognize
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.spec import ComponentFiles
from diffsynth_core.progress import SilentReporter
from diffsynth_core.weights.headers import read_headers
from diffsynth_core.weights.tensors import iterate_weights
from tests.conftest import MODEL_ID, PLACES

CPU = torch.device("cpu")
LAYER = "transformer_blocks.0.attn.to_q"
FLOAT8 = torch.float8_e4m3fn


class Told(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def family():
    return load_family("qwen-image")


def files_of(paths: tuple[Path, ...], component: str = "dit", config: Path | None = None) -> ComponentFiles:
    _, layout = recognize(read_headers(paths), load_family("qwen-image").facts)
    config = config or paths[0].parent / "config.json"
    return ComponentFiles(component, "x", paths, config, layout, storage="float8")


@pytest.fixture
def files(tiny_models):
    return files_of(tuple(sorted((tiny_models / MODEL_ID).glob(PLACES["dit"]))))


@pytest.fixture
def rewritten(files, tmp_path):
    """The transformer in one file, with some tensors changed."""

    def write(change) -> ComponentFiles:
        tensors = {name: tensor for path in files.paths for name, tensor in load_file(path).items()}
        path = tmp_path / "transformer.safetensors"
        save_file({name: change(name, tensor) for name, tensor in tensors.items()}, path)
        return files_of((path,), config=files.config_path)

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_the_kind_are_rounded_once_and_all_others_are_as_ever(family, files, dtype):
    narrow = load_component(family, files, dtype, CPU, SilentReporter())
    wide = load_component(family, replace(files, storage="plain"), dtype, CPU, SilentReporter())
    stored = {name for name, module in narrow.named_modules() if isinstance(module, StoredLinear)}
    assert LAYER in stored and "transformer_blocks.0.img_mod.1" in stored
    assert stored.isdisjoint({"img_in", "txt_in", "proj_out", "norm_out.linear"})
    for name, module in wide.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            ours = getattr(narrow.get_submodule(name), leaf)
            rounded = parameter.to(FLOAT8).to(dtype) if name in stored and leaf == "weight" else parameter
            assert torch.equal(ours, rounded) and ours.dtype == dtype, (name, leaf)
    assert narrow.dtype == wide.dtype == dtype
    assert not any(parameter.requires_grad for parameter in narrow.parameters()) and not narrow.training


def test_half_the_bytes_of_bfloat16(family, files):
    sizes = []
    for each in (files, replace(files, storage="plain")):
        module = load_component(family, each, torch.bfloat16, CPU, SilentReporter())
        layers = [layer for layer in module.modules() if type(layer) in (StoredLinear, torch.nn.Linear)]
        kept = {id(layer): getattr(layer, "stored", None) for layer in layers}
        sizes.append(sum(p.nbytes for p in module.parameters()))
        if each.storage == "float8":
            converted = sum(bytes_.nbytes for bytes_ in kept.values() if bytes_ is not None)
    assert sizes[1] - sizes[0] == converted > 0.6 * sizes[1] / 2


def test_no_weight_of_the_kind_is_ever_placed_wide(family, files, monkeypatch):
    """When a tensor is read, earlier ones are already stored in 8-bit floats."""
    wide_so_far = []

    def watching(part, skipped):
        for weight in iterate_weights(part, skipped):
            stored = [layer.stored for layer in built[0].modules() if isinstance(layer, StoredLinear)]
            filled = [each for each in built[0].parameters() if each.device.type == "cpu"]
            wide_so_far.append(sum(each.nbytes for each in filled) - sum(each.nbytes for each in stored))
            yield weight

    built = [build_empty(family, files)]
    monkeypatch.setattr(loading, "build_empty", lambda *_: built[0])
    monkeypatch.setattr(loading, "iterate_weights", watching)
    module = load_component(family, files, torch.bfloat16, CPU, SilentReporter())
    wide = [each for each in module.parameters() if each.dtype == torch.bfloat16]
    assert 0 < max(wide_so_far) <= sum(each.nbytes for each in wide)


def test_a_weight_beyond_the_range_stays_wide_and_is_told(family, rewritten):
    files = rewritten(lambda name, tensor: tensor * 1e5 if name == f"{LAYER}.weight" else tensor)
    recorder = Told()
    module = load_component(family, files, torch.bfloat16, CPU, recorder)
    layer = module.get_submodule(LAYER)
    assert not isinstance(layer, StoredLinear) and torch.isfinite(layer.weight).all()
    assert isinstance(module.get_submodule("transformer_blocks.0.attn.to_k"), StoredLinear)
    assert recorder.lines == [f"dit: 1 weight outside ±448, the fp8 range, kept in bfloat16: `{LAYER}.weight`"]


def test_within_the_range_nothing_is_told(family, files):
    recorder = Told()
    load_component(family, files, torch.bfloat16, CPU, recorder)
    assert recorder.lines == []


@pytest.mark.parametrize("narrow", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_files_in_8_bit_floats_are_read_into_either(family, rewritten, narrow):
    files = rewritten(lambda name, tensor: tensor.to(narrow) if tensor.ndim == 2 else tensor)
    assert shape_problems(family, files) == []
    values = load_file(files.paths[0])[f"{LAYER}.weight"].float()
    wide = load_component(family, replace(files, storage="plain"), torch.bfloat16, CPU, SilentReporter())
    stored = load_component(family, files, torch.bfloat16, CPU, SilentReporter())
    assert torch.equal(wide.get_submodule(LAYER).weight, values.bfloat16())
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.bfloat16}
    assert isinstance(stored.get_submodule(LAYER), StoredLinear)
    assert torch.equal(stored.get_submodule(LAYER).weight.float(), values.to(FLOAT8).float())


def test_training_such_a_file_in_full_does_not_write_8_bit_floats(rewritten):
    files = rewritten(lambda name, tensor: tensor.to(FLOAT8) if tensor.ndim == 2 else tensor.float())
    dtypes = stored_dtypes(files)
    assert dtypes[f"{LAYER}.weight"] == "BF16" and dtypes[f"{LAYER}.bias"] == "F32"


def test_a_tied_table_stays(family, tiny_models):
    files = files_of(tuple(sorted((tiny_models / MODEL_ID).glob(PLACES["text_encoder"]))), "text_encoder")
    module = load_component(family, files, torch.bfloat16, CPU, SilentReporter())
    assert isinstance(module.model.language_model.layers[0].self_attn.q_proj, StoredLinear)
    assert type(module.lm_head) is torch.nn.Linear
    assert module.model.language_model.embed_tokens.weight.dtype == torch.bfloat16
    assert module.dtype == torch.bfloat16
