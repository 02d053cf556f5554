"""Base files in every layout in use: training loads what merge-lora loads, and the plan counts their bytes.

The expected weights are computed from the tensors that were written: stored values times their scales.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.conversion.bases import open_base
from diffsynth_core.conversion.merge_plan import plan_merge
from diffsynth_core.conversion.merging import merge
from diffsynth_core.conversion.provenance import InputHashes
from diffsynth_core.errors import DiffSynthError, collect_problems
from diffsynth_core.hub.model_files import locate
from diffsynth_core.models.flux2.keys import DIT_ORIGINAL
from diffsynth_core.models.loading import load_component
from diffsynth_core.models.registry import FAMILIES, load_family
from diffsynth_core.models.spec import ComponentFiles
from diffsynth_core.models.wan.keys import VAE_2_1
from diffsynth_core.planning.model.components import find_components
from diffsynth_core.planning.model.file_assignment import read_file_set
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.weights.weighted_files import WeightedFile
from tests.loras import RECIPES, random_lora, save_lora, write_tiny_family

Tensors = Mapping[str, Tensor]
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
ENCODERS = {
    "text_encoder": "text_encoders.encoder_7b.transformer.",
    "text_encoder_1": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
    "vae": "vae.",
}
"""Prefixes of ComfyUI for components other than the transformer in a checkpoint."""
FP8 = torch.float8_e4m3fn
SCALES: dict[str, Callable[[Tensor], tuple[int, ...]]] = {
    "scalar": lambda weight: (),
    "one": lambda weight: (1,),
    "row": lambda weight: (len(weight),),
    "row-column": lambda weight: (len(weight), 1),
    "row-blocks": lambda weight: (len(weight), 2, 1),
    "blocks": lambda weight: (len(weight) // 4, 2),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model base path with the tiny models of all families."""
    folder = tmp_path_factory.mktemp("models")
    for family in RECIPES:
        write_tiny_family(family, folder)
    return folder


@pytest.fixture(scope="module")
def stored(base: Path) -> Callable[[str], dict[str, dict[str, Tensor]]]:
    """Return the tensors of each component of a family, by key in its files."""

    @cache
    def read(family: str) -> dict[str, dict[str, Tensor]]:
        found = find(family, base, {"recipe": RECIPES[family]})
        return {name: read_tensors(files.paths) for name, files in found.components.items()}

    return read


def read_tensors(paths) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= torch.load(path, weights_only=True) if path.suffix == ".pth" else load_file(path)
    return tensors


def find(family: str, base: Path, flags: dict[str, object]) -> ModelPlan:
    """Return the components in the parameters, ignoring missing ones."""
    from diffsynth_core.config.resolve import resolve

    with collect_problems(missing_apart=True) as problems:
        found = find_components(resolve(flags).parameters, family, base)
    assert found, problems
    return found


def transformer_of(family: str, *paths: object) -> tuple[ComponentFiles, ModelPlan]:
    """Return the transformer in `model_paths`."""
    names = [str(path) for path in paths]
    with collect_problems() as problems:
        found = find_components(Parameters(model_paths=tuple((name,) for name in names)), family, Path())
    assert found, problems
    return found.components["dit"], found


def loaded(family: str, files: ComponentFiles, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a component as in training, by module key."""
    module = load_component(load_family(family), files, dtype, torch.device("cpu"), SilentReporter())
    return {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("stored")}


def expected(family: str, tensors: Tensors) -> dict[str, Tensor]:
    """Return the weights of a transformer by module key."""
    facts = FAMILIES[family]
    layouts = facts.component("dit").layouts
    layout = next(layout for layout in layouts if layout.signature <= tensors.keys())
    return {name: part for key, tensor in tensors.items() for name, part in layout.names.split(key, tensor).items()}


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() >= wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].float(), tensor.float()), name


def merged(family: str, path: Path, folder: Path) -> dict[str, Tensor]:
    """Merge a LoRA without effect into a base, in float32."""
    base = open_base(str(path), Path())
    shapes = dict(list(base.shapes.items())[:3])
    lora = {name: type(weights)(weights.A, weights.B * 0) for name, weights in random_lora(shapes).items()}
    lora_format = "diffsynth"
    file = save_lora(folder / "zero.safetensors", lora, family, lora_format)
    plan = plan_merge(base, [WeightedFile(file)], folder / "merged", "float32")
    merge(plan, InputHashes(plan.hashed), SilentReporter())
    return read_tensors(sorted((folder / "merged").glob("*.safetensors")))


def quantized(tensors: Tensors, spelling: str, shape: Callable[[Tensor], tuple[int, ...]]) -> tuple[dict, dict]:
    """Return (tensors of a file with scaled 8-bit floats for matrices of blocks, the weights that they represent)."""
    written: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if tensor.ndim != 2 or layer == name or "blocks." not in name:
            written[name] = weights[name] = tensor
            continue
        scale = torch.rand(shape(tensor), generator=generator) + 0.5
        narrow = tensor.to(FP8)
        rows, columns = (*scale.squeeze(-1).shape, 1, 1)[:2] if scale.ndim != 2 else scale.shape
        if scale.numel() == 1:
            rows = columns = 1
        wide = scale.reshape(rows, columns).repeat_interleave(len(tensor) // rows, 0)
        weights[name] = narrow.float() * wide.repeat_interleave(tensor.shape[1] // columns, 1)
        written[name] = narrow
        if spelling == "scale_weight":
            written |= {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.ones(())}
        elif spelling == "weight_scale_inv":
            written[f"{layer}.weight_scale_inv"] = scale
        else:
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            written |= {
                f"{layer}.weight_scale": scale,
                f"{layer}.input_scale": torch.ones(()),
                f"{layer}.comfy_quant": torch.tensor(list(text), dtype=torch.uint8),
            }
    if spelling == "scale_weight":
        written["scaled_fp8"] = torch.zeros(2).to(FP8)
    return written, weights


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", RECIPES)
def test_a_single_file_below_each_prefix(family, prefix, stored, tmp_path):
    tensors = stored(family)["dit"]
    path = tmp_path / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    files, _ = transformer_of(family, path)
    assert files.prefix == prefix
    assert_equal(loaded(family, files), expected(family, tensors))
    result = merged(family, path, tmp_path)
    assert_equal(result, {prefix + name: tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("family", RECIPES)
def test_scaled_8_bit_floats(family, spelling, stored, tmp_path):
    written, weights = quantized(stored(family)["dit"], spelling, SCALES["scalar"])
    path = tmp_path / "model.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in written.items()}, path)
    files, _ = transformer_of(family, path)
    assert_equal(loaded(family, files), expected(family, weights))
    narrow = loaded(family, files, torch.bfloat16)
    wanted = expected(family, weights)
    kept = [name for name, tensor in narrow.items() if tensor.dtype == torch.bfloat16]
    assert len(kept) > len(narrow) / 2
    assert_equal(narrow, {name: wanted[name].bfloat16() for name in kept})
    result = merged(family, path, tmp_path)
    assert_equal(result, {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()})
    assert not [name for name in result if name.rpartition(".")[2] not in ("weight", "bias", "modulation", "scale")]


@pytest.mark.parametrize("shape", SCALES)
def test_scales_of_every_shape(shape, stored, tmp_path):
    """Per tensor, per row, and per block of rows and columns, as transformers stores them; FLUX.1's fused matrices are
    split by rows.
    """
    spelling = "weight_scale_inv" if shape == "blocks" else "weight_scale"
    written, weights = quantized(stored("flux")["dit"], spelling, SCALES[shape])
    path = tmp_path / "model.safetensors"
    save_file(written, path)
    files, _ = transformer_of("flux", path)
    assert_equal(loaded("flux", files), expected("flux", weights))
    assert_equal(merged("flux", path, tmp_path), weights)


@pytest.mark.parametrize("family", RECIPES)
def test_a_checkpoint_of_all_components(family, stored, tmp_path):
    """Each component is read from below its own prefix, and only its bytes are counted for it."""
    components = {name: tensors for name, tensors in stored(family).items() if name in ("dit", *ENCODERS)}
    scaled, weights = quantized(components["dit"], "scale_weight", SCALES["scalar"])
    prefixes = {"dit": "model.diffusion_model.", **ENCODERS}
    everything = {
        prefixes[name] + key: tensor.clone()
        for name, tensors in {**components, "dit": scaled}.items()
        for key, tensor in tensors.items()
    }
    extras = {"text_encoders.clip_l.logit_scale": torch.ones(()), "text_encoders.spiece_model": torch.ones(3)}
    path = tmp_path / "checkpoint.safetensors"
    save_file(everything | extras, path)
    (file_set,) = locate([[str(path)]], (), Path())[0]
    parts = {found.part.prefix: found for found in read_file_set(file_set)}
    assert parts.keys() == {prefixes[name] for name in components}
    files, found = transformer_of(family, path)
    assert found.components.keys() == components.keys()
    assert_equal(loaded(family, files), expected(family, weights))
    for name, tensors in components.items():
        part = parts[prefixes[name]].part
        scales = [tensor for key, tensor in scaled.items() if key.endswith(".scale_weight")] if name == "dit" else []
        own = [scaled[key] for key in weights] if name == "dit" else list(tensors.values())
        assert part.nbytes == sum(tensor.nbytes for tensor in (*own, *scales))
    result = merged(family, path, tmp_path)
    assert_equal(result, {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()})


@pytest.mark.parametrize("family", RECIPES)
def test_folders_files_and_shards_listed_flat(family, stored, tmp_path):
    """One component by its folder, by its shards, and in the folder of a pipeline."""
    tensors = stored(family)["dit"]
    folder = tmp_path / "pipeline/transformer"
    folder.mkdir(parents=True)
    names = list(tensors)
    shards = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for path, part in zip(shards, (names[: len(names) // 2], names[len(names) // 2 :]), strict=True):
        save_file({name: tensors[name] for name in part}, path)
    (tmp_path / "pipeline/vae").mkdir()
    save_file(dict(stored(family)["vae"]), tmp_path / "pipeline/vae/model.safetensors")
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    wanted = expected(family, tensors)
    for given in ([folder], shards, [tmp_path / "pipeline"], [f"{folder}/*.safetensors"]):
        files, found = transformer_of(family, *given)
        assert files.paths == tuple(shards)
        assert ("vae" in found.components) == (given == [tmp_path / "pipeline"])
        assert_equal(loaded(family, files), wanted)
    assert_equal(merged(family, folder, tmp_path), tensors)


def test_flux_2_in_the_names_of_its_makers(stored, tmp_path):
    tensors = stored("flux2")["dit"]
    original = {key: DIT_ORIGINAL.fuse(key, tensors) for key in DIT_ORIGINAL.to_sources(tensors)}
    path = tmp_path / "flux-2-klein-4b.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in original.items()}, path)
    files, _ = transformer_of("flux2", path)
    assert_equal(loaded("flux2", files), tensors)
    assert_equal(merged("flux2", path, tmp_path), original)


def test_the_vae_of_qwen_image_in_the_names_of_wan(stored, base, tmp_path):
    """As in ComfyUI: the same network. Without a family it is Wan's."""
    tensors = stored("qwen-image")["vae"]
    original = {key: VAE_2_1.fuse(key, tensors).contiguous() for key in VAE_2_1.to_sources(tensors)}
    path = tmp_path / "qwen_image_vae.safetensors"
    save_file(original, path)
    with collect_problems():
        found = find_components(Parameters(model_paths=((str(path),),)), "qwen-image", Path())
    assert found
    read = loaded("qwen-image", found.components["vae"])
    assert read.keys() == tensors.keys()
    assert_equal(read, tensors)
    assert open_base(str(path), Path()).facts.name == "wan"


def test_8_bit_floats_with_a_scale_are_kept_as_they_are_where_that_is_asked_for(stored, tmp_path):
    """Nothing is rounded again: a layer computes with stored value x scale."""
    from diffsynth_core.adapters.stored import StoredLinear

    for shape, storage in product(("scalar", "row", "blocks"), ("float8", "fp8")):
        written, weights = quantized(stored("flux")["dit"], "weight_scale", SCALES[shape])
        path = tmp_path / f"{shape}.safetensors"
        save_file(written, path)
        asked = {"fp8_models": (str(path),)} if storage == "float8" else {"quant_options": f"{path}:fp8"}
        parameters = Parameters(model_paths=((str(path),),), **asked)
        with collect_problems():
            found = find_components(parameters, "flux", Path())
        assert found
        module = load_component(
            load_family("flux"), found.components["dit"], torch.bfloat16, torch.device("cpu"), SilentReporter()
        )
        wanted = expected("flux", weights)
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, StoredLinear)}
        assert "transformer_blocks.0.attn.to_k" in layers
        for name, layer in layers.items():
            exact = wanted[f"{name}.weight"]
            if shape == "blocks" and storage == "fp8":  # no layer multiplies by block: rounded with a scale per row
                assert (layer.weight.float() - exact).norm() < 0.04 * exact.norm()
                continue
            if shape == "blocks":  # or without a scale
                assert layer.scale is None and torch.equal(layer.weight, exact.to(FP8).bfloat16())
                continue
            assert torch.equal(layer.weight, exact.bfloat16())
            x = torch.randn(3, layer.in_features).bfloat16().requires_grad_()
            layer(x).sum().backward()
            plain = x.detach().clone().requires_grad_()
            torch.nn.functional.linear(plain, exact.bfloat16(), layer.bias).sum().backward()
            assert torch.equal(x.grad, plain.grad)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.0.a.weight_scale": torch.ones(3)}, "has the scale `blocks.0.a.weight_scale`, but no"),
        ({"Q.weight_scale": torch.ones(7)}, "of shape [7] does not match"),
        ({"Q.weight": torch.ones(4, 4, dtype=torch.int8), "Q.weight_scale": torch.ones(4, 1)}, "is I8, its scale F32"),
        ({"Q.weight_scale": torch.ones(()), "Q.scale_weight": torch.ones(())}, "has two scales for"),
        ({"Q.weight_scale_2": torch.ones(())}, "quantized weights (`Q.weight_scale_2`)"),
        ({"Q.weight_scale": torch.ones(()), "Q.comfy_quant": '{"format": "int8_tensorwise"}'}, "`int8_tensorwise`"),
        (
            {"Q.weight_scale": torch.ones(()), "Q.comfy_quant": '{"format": "float8_e4m3fn", "convrot": true}'},
            "`float8_e4m3fn, convrot`",
        ),
        ({"Q.weight_scale": torch.ones(()), "Q.comfy_quant": "{"}, "cannot read the layer formats"),
        ({"Q.comfy_quant": '{"format": "float8_e4m3fn"}'}, "contains no scale for it"),
    ],
)
def test_what_is_stored_in_another_way_is_refused_by_all(change, words, stored, tmp_path):
    """Training and merge-lora reject it alike, before reading weights."""
    tensors = dict(stored("qwen-image")["dit"])
    layer = "transformer_blocks.0.attn.to_q"
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(FP8)
    for name, value in change.items():
        text = torch.tensor(list(value.encode()), dtype=torch.uint8) if isinstance(value, str) else value
        tensors[name.replace("Q.", f"{layer}.")] = text
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with pytest.raises(DiffSynthError) as caught:
        open_base(str(path), Path())
    with collect_problems() as problems:
        find_components(Parameters(model_paths=((str(path),),)), "qwen-image", Path())
    assert words.replace("Q.", f"{layer}.") in str(caught.value)
    assert str(caught.value) in [problem.message for problem in problems]


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_a_gguf_file_is_named_as_such(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"GGUF" + bytes(60))
    with collect_problems() as problems:
        find_components(Parameters(model_paths=((str(path),),)), "qwen-image", Path())
    with pytest.raises(DiffSynthError, match="is a GGUF file") as caught:
        open_base(str(path), Path())
    assert str(caught.value) in [problem.message for problem in problems]
