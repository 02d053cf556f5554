"""FLUX.1's tiny components: published paths and keys, loadable, with different outputs for different inputs."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from diffsynth_core.models.flux import keys
from diffsynth_core.models.flux.components import SCALING_FACTOR, SHIFT_FACTOR, build, config_of, load_tokenizer
from diffsynth_core.models.flux.tiny import TinySizes, write_tiny_weights
from diffsynth_core.models.spec import ComponentFiles
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap

DEV = "black-forest-labs/FLUX.1-dev"
CASES: dict[str, tuple[str, str, KeyMap, bool]] = {
    "transformer": ("dit", "flux1-dev.safetensors", keys.DIT_ORIGINAL, False),
    "transformer, diffusers": ("dit", "transformer/*.safetensors", SAME_NAMES, True),
    "vae": ("vae", "ae.safetensors", keys.VAE_ORIGINAL, False),
    "vae, diffusers": ("vae", "vae/diffusion_pytorch_model.safetensors", SAME_NAMES, True),
    "clip": ("text_encoder_1", "text_encoder/model.safetensors", keys.CLIP, True),
    "t5": ("text_encoder_2", "text_encoder_2/*.safetensors", keys.T5, True),
}
"""Component, its path in the repository, its key map, and whether it has a config.json."""
CAPTIONS = ("a cat", "a dog", "the cat and the hat", "A CAT!", "")


def load(base: Path, case: str) -> nn.Module:
    """Load a written component by names and shapes as any other, with nothing missing."""
    component, pattern, table, configured = CASES[case]
    write_tiny_weights(base, component, DEV, pattern)
    ours: dict[str, Tensor] = {}
    for path in sorted((base / DEV).glob(pattern)):
        for name, tensor in load_file(path).items():
            assert table.to_targets(name) is not None
            ours |= table.split(name, tensor.float())
    config_path = (base / DEV / pattern).parent / "config.json"
    assert config_path.exists() == configured
    files = ComponentFiles(component, "x", (), config_path if configured else None)
    module = build(component, config_of(files, {name: tuple(tensor.shape) for name, tensor in ours.items()}))
    missing, unexpected = module.load_state_dict(ours, strict=False)
    assert (set(missing) - {"encoder.embed_tokens.weight"}, unexpected) == (set(), [])
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in ours.items())
    return module.eval()


@pytest.mark.parametrize("case", CASES)
def test_components_load_back_from_shapes_or_their_configuration(tmp_path, case):
    weights = [parameter for name, parameter in load(tmp_path, case).named_parameters() if name.endswith("weight")]
    assert weights and all(weight.isfinite().all() and weight.any() for weight in weights)


@pytest.mark.parametrize(("case", "files"), [
    ("transformer, diffusers", {"config.json", "diffusion_pytorch_model-00001-of-00002.safetensors"}),
    ("t5", {"config.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}),
])  # fmt: skip
def test_shards_are_named_as_the_published_ones(tmp_path, case, files):
    load(tmp_path, case)
    folder = (tmp_path / DEV / CASES[case][1]).parent
    assert files <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_each_layout_holds_the_same_weights(tmp_path, component):
    first, second = (load(tmp_path, case).state_dict() for case in (component, f"{component}, diffusers"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", CASES)
def test_the_same_command_writes_the_same_bytes(tmp_path, case):
    written = []
    for number in range(2):
        base = tmp_path / str(number)
        write_tiny_weights(base, CASES[case][0], DEV, CASES[case][1])
        written.append({path.relative_to(base): path.read_bytes() for path in base.rglob("*") if path.is_file()})
    assert written[0] and written[0] == written[1]


def test_sizes_can_be_chosen(tmp_path):
    sizes = TinySizes(blocks=3, heads=4, head_size=32, text_width=96, pooled_width=24)
    write_tiny_weights(tmp_path, "dit", DEV, "flux1-dev.safetensors", sizes)
    tensors = load_file(tmp_path / DEV / "flux1-dev.safetensors")
    assert tensors["txt_in.weight"].shape == (128, 96)
    assert tensors["vector_in.in_layer.weight"].shape == (128, 24)
    assert "double_blocks.2.img_attn.qkv.weight" in tensors


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """[5, 3, 128, 160], -1 to 1."""
    images = []
    for name in ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field"):
        pixels = np.array(Image.fromarray(getattr(skimage.data, name)()[..., :3]).resize((160, 128)))
        images.append(torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(images)


@pytest.mark.parametrize("case", ["vae", "vae, diffusers"])
@torch.no_grad()
def test_latents_have_mean_0_and_spread_1_and_tell_images_apart(tmp_path, photographs, case):
    vae = load(tmp_path, case)
    assert (vae.config.shift_factor, vae.config.scaling_factor) == (SHIFT_FACTOR, SCALING_FACTOR)
    latents = (vae.encode(photographs).latent_dist.mode() - SHIFT_FACTOR) * SCALING_FACTOR
    assert latents.shape == (5, 16, 16, 20)
    assert abs(latents.mean()) < 0.3
    assert 0.7 < latents.std() < 1.3
    assert latents.std(dim=0).mean() > 0.4


@torch.no_grad()
def test_captions_become_different_tokens_and_states(tmp_path):
    clip, t5 = load(tmp_path, "clip"), load(tmp_path, "t5")
    folder = tmp_path / DEV
    tokenizers = [
        load_tokenizer(f"tokenizer_{number}_path", folder / name)
        for number, name in ((1, "tokenizer"), (2, "tokenizer_2"))
    ]
    for tokenizer, encoder, length, output in zip(
        tokenizers, (clip, t5), (77, 512), ("pooler_output", "last_hidden_state"), strict=True
    ):
        tokens = tokenizer(
            list(CAPTIONS), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        assert tokens.shape == (len(CAPTIONS), length)
        assert int(tokens.max()) < encoder.config.vocab_size
        assert len({tuple(numbers) for numbers in tokens.tolist()}) == len(CAPTIONS)
        states = getattr(encoder(tokens), output)
        assert (states[0] - states[1]).std() > 0.3 * states.std()


def test_clip_s_tokenizer_begins_ends_and_pads_as_the_published_one(tmp_path):
    load(tmp_path, "clip")
    tokenizer = load_tokenizer("tokenizer_1_path", tmp_path / DEV / "tokenizer")
    assert len(tokenizer) == 521
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    tokens = tokenizer(["The Cat", "the  cat and 猫"])["input_ids"]
    assert all(numbers[0] == start and numbers[-1] == end for numbers in tokens)
    assert tokens[0] == [*tokens[1][: len(tokens[0]) - 1], end]
    assert tokenizer.pad_token_id == end
    assert end not in tokens[1][:-1], "bytes stand for all characters"
    assert tokenizer.decode(tokens[1], skip_special_tokens=True) == "the cat and 猫"


@torch.no_grad()
def test_a_first_loss_is_near_that_of_predicting_nothing(tmp_path):
    torch.manual_seed(0)
    transformer = load(tmp_path, "transformer")
    clean, noise = torch.randn(2, 4, 20, 64)
    ids = torch.stack([torch.zeros(20), torch.arange(20) // 5, torch.arange(20) % 5], dim=1)
    predicted = transformer(
        hidden_states=(clean + noise) / 2,
        timestep=torch.full((4,), 0.5),
        guidance=torch.ones(4),
        pooled_projections=torch.randn(4, 32),
        encoder_hidden_states=torch.randn(4, 30, 64),
        txt_ids=torch.zeros(30, 3),
        img_ids=ids,
    ).sample
    target = noise - clean
    loss = (predicted - target).square().mean() / target.square().mean()
    assert 0.9 < loss < 1.3
    assert (predicted[0] - predicted[1]).std() > 0.3 * predicted.std()
