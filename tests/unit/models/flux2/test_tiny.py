"""FLUX.2's tiny components: published paths and keys, loadable, distinguished from others."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import collect_problems
from diffsynth_core.json_files import read_json
from diffsynth_core.models.flux2.components import build, config_of, load_tokenizer
from diffsynth_core.models.flux2.encode import apply_template
from diffsynth_core.models.flux2.tiny import TinySizes, write_tiny_weights
from diffsynth_core.models.spec import ComponentFiles
from diffsynth_core.planning.model.components import find_components, shape_faults

FILE_PATTERNS = {
    "dit": "transformer/*.safetensors",
    "text_encoder": "text_encoder/*.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
KLEIN_4B, KLEIN_9B = "black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-9B"
TRANSFORMERS = {
    KLEIN_4B: 20,
    "black-forest-labs/FLUX.2-klein-base-4B": 20,
    KLEIN_9B: 24,
    "black-forest-labs/FLUX.2-klein-base-9B": 24,
}


def names_in(folder: Path) -> set[str]:
    """Return the tensor names of all files in a folder."""
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


def load(base: Path, component: str, model_id: str) -> nn.Module:
    """Load a written component with nothing missing."""
    write_tiny_weights(base, component, model_id, FILE_PATTERNS[component])
    folder = (base / model_id / FILE_PATTERNS[component]).parent
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    module = build(component, config_of(ComponentFiles(component, "x", (), folder / "config.json"), shapes))
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"} and unexpected == []
    return module.eval()


@pytest.mark.parametrize(("model_id", "single_blocks"), TRANSFORMERS.items())
def test_transformers_have_all_the_single_blocks_that_recipes_name(tmp_path, model_id, single_blocks):
    module = load(tmp_path, "dit", model_id)
    assert (module.config.num_single_layers, module.config.num_layers) == (single_blocks, 2)
    assert module.config.guidance_embeds is False
    config = read_json(tmp_path / model_id / "transformer" / "config.json", dict, "")
    assert config["_class_name"] == "Flux2Transformer2DModel"
    assert {name for name in config if name.startswith("_")} <= {"_class_name", "_diffusers_version"}


@pytest.mark.parametrize(("component", "stem"), [("dit", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_files_are_named_as_the_published_ones(tmp_path, component, stem):
    write_tiny_weights(tmp_path, component, KLEIN_9B, FILE_PATTERNS[component])
    folder = (tmp_path / KLEIN_9B / FILE_PATTERNS[component]).parent
    shards = [f"{stem}-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    assert {path.name for path in folder.iterdir()} == {"config.json", f"{stem}.safetensors.index.json", *shards}
    index = json.loads((folder / f"{stem}.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == set(shards) and index.keys() == names_in(folder)


@pytest.mark.parametrize(("model_id", "head"), [(KLEIN_4B, False), (KLEIN_9B, True)])
def test_only_the_large_text_encoder_has_a_vocabulary_head_of_its_own(tmp_path, model_id, head):
    module = load(tmp_path, "text_encoder", model_id)
    assert ("lm_head.weight" in names_in(tmp_path / model_id / "text_encoder")) == head
    assert (module.lm_head.weight is module.model.embed_tokens.weight) != head
    assert len(module.model.layers) == 28


def test_the_vae_s_statistics_are_written_exactly(tmp_path):
    vae = load(tmp_path, "vae", KLEIN_4B)
    assert len(vae.bn.running_mean.unique()) == len(vae.bn.running_var.unique()) == 128
    with safe_open(tmp_path / KLEIN_4B / FILE_PATTERNS["vae"], "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - no mapping
    statistics = {name: dtypes.pop(name) for name in list(dtypes) if name.startswith("bn.")}
    assert statistics == {
        "bn.running_mean": torch.float32,
        "bn.running_var": torch.float32,
        "bn.num_batches_tracked": torch.int64,
    }
    assert set(dtypes.values()) == {torch.bfloat16}


@pytest.mark.parametrize("component", FILE_PATTERNS)
def test_the_same_command_writes_the_same_bytes(tmp_path, component):
    for number in range(2):
        write_tiny_weights(tmp_path / str(number), component, KLEIN_4B, FILE_PATTERNS[component])
    first, again = (
        {path.relative_to(base): path.read_bytes() for path in base.rglob("*") if path.is_file()}
        for base in (tmp_path / "0", tmp_path / "1")
    )
    assert first and first == again


def test_the_template_is_qwen3_s(tmp_path):
    write_tiny_weights(tmp_path, "text_encoder", KLEIN_4B, FILE_PATTERNS["text_encoder"])
    tokenizer = load_tokenizer(tmp_path / KLEIN_4B / "tokenizer")
    expected = "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert apply_template(tokenizer, "a cat") == expected
    assert apply_template(tokenizer, "") == expected.replace("a cat", "")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(expected)["input_ids"])
    assert tokens[:3] == ["<|im_start|>", "user", "Ċ"] and "<think>" in tokens
    assert tokenizer.pad_token == "<|endoftext|>"
    padded = tokenizer("a", padding="max_length", max_length=512, truncation=True)
    assert padded["attention_mask"] == [1] + [0] * 511


def find(base: Path, problems: list, **models: str):
    """Find components as a run does."""
    entries = tuple(f"{model_id}:{FILE_PATTERNS[component]}" for component, model_id in models.items())
    with collect_problems() as found:
        result = find_components(Parameters(model_id_with_origin_paths=entries), "flux2", base)
    problems += found
    return result


@pytest.mark.parametrize("model_id", [KLEIN_4B, KLEIN_9B])
def test_a_run_finds_all_of_it(tmp_path, model_id):
    for component, place in FILE_PATTERNS.items():
        write_tiny_weights(tmp_path, component, model_id, place)
    problems: list = []
    found = find(tmp_path, problems, **dict.fromkeys(FILE_PATTERNS, model_id))
    assert problems == [] and shape_faults(found) == []
    assert found.variant.model_id == model_id
    assert found.tokenizers == {"tokenizer_path": tmp_path / model_id / "tokenizer"}


def test_a_text_encoder_of_another_size_is_refused(tmp_path):
    for component, model_id in (("dit", KLEIN_4B), ("vae", KLEIN_4B)):
        write_tiny_weights(tmp_path, component, model_id, FILE_PATTERNS[component])
    write_tiny_weights(tmp_path, "text_encoder", KLEIN_9B, FILE_PATTERNS["text_encoder"], TinySizes(text_width=64))
    problems: list = []
    find(tmp_path, problems, dit=KLEIN_4B, vae=KLEIN_4B, text_encoder=KLEIN_9B)
    (problem,) = problems
    assert problem.message == (
        f"the text_encoder from `{KLEIN_9B}:text_encoder/*.safetensors` makes text states with 64 channels, "
        "but the dit of FLUX.2 klein expects 32"
    )
    assert problem.hint == "use the text_encoder of the same model"


def test_a_vae_of_other_latents_is_refused(tmp_path):
    for component, place in FILE_PATTERNS.items():
        write_tiny_weights(tmp_path, component, KLEIN_4B, place)
    path = tmp_path / KLEIN_4B / FILE_PATTERNS["vae"]
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    save_file(tensors | {"bn.running_mean": torch.zeros(64)}, path)
    problems: list = []
    find(tmp_path, problems, **dict.fromkeys(FILE_PATTERNS, KLEIN_4B))
    assert [problem.message for problem in problems] == [
        f"the vae from `{KLEIN_4B}:{FILE_PATTERNS['vae']}` makes latents with 64 channels, but the dit of FLUX.2 klein expects 128"
    ]


@pytest.mark.parametrize(("component", "other"), [("dit", "vae"), ("vae", "dit")])
def test_the_configuration_of_another_component_is_not_taken(tmp_path, component, other):
    for name in (component, other):
        write_tiny_weights(tmp_path, name, KLEIN_4B, FILE_PATTERNS[name])
    folders = {name: (tmp_path / KLEIN_4B / FILE_PATTERNS[name]).parent for name in (component, other)}
    problems: list = []
    assert find(tmp_path, problems, **{component: KLEIN_4B}).components[component].config_path is not None
    (folders[component] / "config.json").write_bytes((folders[other] / "config.json").read_bytes())
    assert find(tmp_path, problems, **{component: KLEIN_4B}).components[component].config_path is None


def test_flux2_dev_is_told(tmp_path):
    dev = "mine/FLUX.2-dev"
    for component in ("dit", "vae"):
        write_tiny_weights(tmp_path, component, dev, FILE_PATTERNS[component])
    (tmp_path / dev / "text_encoder").mkdir()
    mistral = ("language_model.model.layers.0.self_attn.q_proj.weight", "multi_modal_projector.linear_1.weight")
    save_file({name: torch.zeros(1) for name in mistral}, tmp_path / dev / "text_encoder" / "model.safetensors")
    problems: list = []
    find(tmp_path, problems, dit=dev, text_encoder=dev, vae=dev)
    messages = {problem.message for problem in problems}
    assert messages == {
        f"`{dev}:transformer/*.safetensors` is the FLUX.2-dev transformer, which is not supported yet",
        f"`{dev}:text_encoder/*.safetensors` is the Mistral text encoder of FLUX.2-dev, not a component of FLUX.2",
    }


def test_a_first_loss_is_near_that_of_predicting_nothing(tmp_path):
    torch.manual_seed(0)
    transformer = load(tmp_path, "dit", KLEIN_4B)
    clean, noise = torch.randn(2, 4, 24, 128)
    positions = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(6), torch.arange(1))
    with torch.no_grad():
        predicted = transformer(
            hidden_states=(clean + noise) / 2,
            timestep=torch.full((4,), 0.5),
            encoder_hidden_states=torch.randn(4, 512, 96),
            img_ids=positions,
            txt_ids=torch.zeros(512, 4, dtype=torch.int64),
            return_dict=False,
        )[0]
    target = noise - clean
    loss = (predicted - target).square().mean() / target.square().mean()
    assert 0.9 < loss < 1.3
    assert (predicted[0] - predicted[1]).std() > 0.3 * predicted.std()
