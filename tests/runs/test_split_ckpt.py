"""Real checkpoints of each family, split: every part loads into its class, and joined they equal the original."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffsynth_core.models.registry import FAMILIES, load_family
from diffsynth_core.models.spec import ComponentFiles
from diffsynth_core.weights.dtypes import safetensors_dtype
from diffsynth_core.weights.headers import make_header
from tests.checkpoints import REHEARSED, rehearse
from tests.conftest import MODEL_ID


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return rehearse(tmp_path_factory.mktemp("rehearsed"))


def same_tensors(left, right):
    one, other = load_file(left), load_file(right)
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def metadata_of(path):
    with safe_open(path, "pt") as stream:
        return stream.metadata()


def in_checkpoint(path, component):
    """Return the full weights of a component in a checkpoint by key, read by other means."""
    prefix = f"pipe.{component}."
    bare = metadata_of(path)["removed_prefix"] == prefix
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(path).items()
        if ".lora_" not in name and (name.startswith(prefix) or (bare and not name.startswith("pipe.")))
    }


def build(family, component, tensors, base):
    """Build the module of a part. Shapes do not determine the heads of Qwen2.5-VL, so config.json is used."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    config = base / MODEL_ID / "text_encoder/config.json" if family.facts.name == "qwen-image" else None
    files = ComponentFiles(component, "", (), config if component == "text_encoder" else None)
    return family.build(component, family.config_of(files, shapes))


@pytest.mark.parametrize("name", REHEARSED)
def test_parts_load_strictly_into_their_classes(cli, checkpoint, tiny_models, name):
    rehearsed, path = REHEARSED[name], checkpoint(name)
    outcome = cli("split-ckpt", path, "--output_path", "parts", "--layout", "diffusers")
    assert outcome.code == 0, outcome.err
    expected = {f"{component}.safetensors" for component in rehearsed.full}
    expected |= {f"{component}.lora.safetensors" for component in rehearsed.lora}
    assert {file.name for file in Path("parts").iterdir()} == expected
    family = load_family(rehearsed.family)
    for component in rehearsed.full:
        tensors = load_file(Path("parts", f"{component}.safetensors"))
        module = build(family, component, tensors, tiny_models)
        tied = set(getattr(module, "all_tied_weights_keys", None) or ())
        if tied - tensors.keys():  # transformers' own way of loading gives those the tensor that they share
            assert module.state_dict().keys() - tensors.keys() <= tied
            tensors |= {key: module.state_dict()[key] for key in tied - tensors.keys()}
        module.load_state_dict(tensors, strict=True)


@pytest.mark.parametrize("name", REHEARSED)
@pytest.mark.parametrize("layout", ["diffusers", "documented", "original"])
def test_layouts_hold_the_same_weights(cli, checkpoint, name, layout):
    """Bytes copied by the command against tensors split and joined by torch."""
    rehearsed, path = REHEARSED[name], checkpoint(name)
    facts = FAMILIES[rehearsed.family]
    if layout == "original" and rehearsed.family == "flux2":
        outcome = cli("split-ckpt", path, "--output_path", "parts", "--layout", layout)
        assert outcome.code == 1 and not Path("parts").exists()
        assert "error: the original names of the component `vae` of FLUX.2 are not known\n" in outcome.err
        return
    assert cli("split-ckpt", path, "--output_path", "parts", "--layout", layout).code == 0
    for component in rehearsed.full:
        held = in_checkpoint(path, component)
        own_layout = next(known for known in facts.component(component).layouts if known.signature <= held.keys())
        own = {key: part for name in held for key, part in own_layout.names.split(name, held[name]).items()}
        names = facts.component(component).names_in(layout, own_layout)
        wanted = {name: names.fuse(name, own) for name in names.to_sources(own)}
        written = load_file(Path("parts", f"{component}.safetensors"))
        assert written.keys() == wanted.keys()
        assert all(torch.equal(written[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", REHEARSED)
@pytest.mark.parametrize("ways", [("--by", "component"), ("--by", "size", "--max_shard_size", "100kB")])
def test_joined_parts_are_the_checkpoint_byte_for_byte(cli, checkpoint, name, ways):
    path = checkpoint(name)
    assert cli("split-ckpt", path, "--output_path", "parts", *ways).code == 0
    outcome = cli("split-ckpt", "parts", "--output_path", "whole", "--join")
    assert outcome.code == 0, outcome.err
    assert Path("whole", path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("lora_format", ["diffsynth", "diffusers", "comfyui", "kohya"])
@pytest.mark.parametrize("name", ["qwen-image", "flux", "wan, nothing removed", "flux2"])
def test_loras_in_the_names_of_other_programs(cli, checkpoint, name, lora_format):
    """As `convert-lora` writes them for the part alone."""
    assert cli("split-ckpt", checkpoint(name), "--output_path", "parts", "--lora_format", lora_format).code == 0
    assert cli("split-ckpt", checkpoint(name), "--output_path", "plain").code == 0
    converted = cli("convert-lora", "plain/dit.lora.safetensors", "--to", lora_format, "-o", "converted.safetensors")
    assert converted.code == 0, converted.err
    assert same_tensors("parts/dit.lora.safetensors", "converted.safetensors")
    assert metadata_of("parts/dit.lora.safetensors")["lora_format"] == lora_format


def test_shards_of_parts_are_joined_too(cli, checkpoint):
    path = checkpoint("qwen-image")
    assert cli("split-ckpt", path, "--output_path", "parts", "--max_shard_size", "100kB").code == 0
    assert len(list(Path("parts").glob("text_encoder-*"))) > 2
    assert cli("split-ckpt", "parts", "--output_path", "whole", "--join").code == 0
    assert Path("whole/epoch-0.safetensors").read_bytes() == path.read_bytes()


def as_the_reference_writes(path, target, count="0."):
    """Return the same checkpoint without metadata, with the ControlNet's index in its keys."""
    tensors = {
        name.replace("pipe.controlnet.", f"pipe.controlnet.models.{count}"): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, target)


@pytest.mark.parametrize("name", ["qwen-image", "flux"])
def test_a_checkpoint_of_the_reference_trainer_is_told_by_names(cli, checkpoint, name):
    as_the_reference_writes(checkpoint(name), "reference.safetensors")
    assert cli("split-ckpt", "reference.safetensors", "--output_path", "parts").code == 0
    assert cli("split-ckpt", checkpoint(name), "--output_path", "expected").code == 0
    for expected in sorted(Path("expected").iterdir()):
        assert same_tensors(expected, Path("parts", expected.name))
    assert len(list(Path("parts").iterdir())) == len(list(Path("expected").iterdir()))


def test_the_record_of_the_run_tells_where_the_file_does_not(cli, checkpoint):
    path = checkpoint("wan, high noise")
    Path("run").mkdir()
    shutil.copy(path.parent / "run.json", "run/run.json")
    partial = {name: tensor for name, tensor in load_file(path).items() if name.startswith("blocks.0.ffn.")}
    save_file(partial, "run/epoch-0.safetensors")
    save_file(partial, "lonely.safetensors")
    assert cli("split-ckpt", "run", "--output_path", "parts", "--layout", "diffusers").code == 0
    assert load_file("parts/dit.safetensors").keys() == {
        f"blocks.0.ffn.net.{module}.{kind}" for module in ("0.proj", "2") for kind in ("weight", "bias")
    }


def write_in_order(path, tensors, metadata):
    """Write keys in the given order; the library's own writer sorts them."""
    header = make_header(
        [(name, safetensors_dtype(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors], metadata
    )
    path.write_bytes(header + b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for _, tensor in tensors))


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_keys_means_nothing(cli, checkpoint, seed):
    """Shuffled keys, in shuffled shards of random sizes: the same parts, and joined the same tensors."""
    path, drawn = checkpoint("flux"), random.Random(seed)
    tensors = list(load_file(path).items())
    drawn.shuffle(tensors)
    cut = drawn.randrange(1, len(tensors))
    Path("shuffled").mkdir()
    for number, part in enumerate((tensors[:cut], tensors[cut:]), start=1):
        write_in_order(Path("shuffled", f"model-0000{number}-of-00002.safetensors"), part, metadata_of(path))
    assert cli("split-ckpt", path, "--output_path", "expected").code == 0
    assert cli("split-ckpt", "shuffled", "--output_path", "parts").code == 0
    for expected in Path("expected").iterdir():
        assert same_tensors(expected, Path("parts", expected.name))
    size = drawn.randrange(10_000, 400_000)
    assert cli("split-ckpt", "shuffled", "--output_path", "sized", "--by", "size", "--max_shard_size", size).code == 0
    for file in Path("sized").glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= size or len(sizes) == 1
    for joined in ("parts", "sized"):
        assert cli("split-ckpt", joined, "--output_path", f"{joined}-whole", "--join").code == 0
        (whole,) = Path(f"{joined}-whole").iterdir()
        assert same_tensors(path, whole)
        assert metadata_of(whole) == metadata_of(path)
