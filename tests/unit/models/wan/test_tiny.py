"""Wan's tiny components: published paths and keys, loadable, with different outputs for different inputs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffsynth_core.json_files import read_json
from diffsynth_core.models.spec import ComponentFiles
from diffsynth_core.models.wan import keys
from diffsynth_core.models.wan.components import build, config_of, load_tokenizer
from diffsynth_core.models.wan.tiny import TinySizes, write_tiny_weights
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap

SHARDS = "diffusion_pytorch_model*.safetensors"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
I2V = "Wan-AI/Wan2.1-I2V-14B-480P"
TRANSFORMERS: dict[str, tuple[str, str, dict[str, object]]] = {
    "t2v": ("Wan-AI/Wan2.1-T2V-1.3B", SHARDS, {"in_channels": 16, "out_channels": 16, "image_dim": None}),
    "i2v": (I2V, SHARDS, {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 32, "pos_embed_seq_len": None}),
    "flf2v": ("Wan-AI/Wan2.1-FLF2V-14B-720P", SHARDS, {"in_channels": 36, "image_dim": 32, "pos_embed_seq_len": 514}),
    "t2v high": ("Wan-AI/Wan2.2-T2V-A14B", f"high_noise_model/{SHARDS}", {"in_channels": 16, "image_dim": None}),
    "t2v low": ("Wan-AI/Wan2.2-T2V-A14B", f"low_noise_model/{SHARDS}", {"in_channels": 16, "image_dim": None}),
    "i2v high": ("Wan-AI/Wan2.2-I2V-A14B", f"high_noise_model/{SHARDS}", {"in_channels": 36, "image_dim": None}),
    "ti2v": ("Wan-AI/Wan2.2-TI2V-5B", SHARDS, {"in_channels": 48, "out_channels": 48, "image_dim": None}),
    "t2v diffusers": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", f"transformer/{SHARDS}", {"in_channels": 16}),
    "flf2v diffusers": ("Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", f"transformer/{SHARDS}", {"pos_embed_seq_len": 514}),
    "i2v low diffusers": ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", f"transformer_2/{SHARDS}", {"in_channels": 36}),
}
OTHERS: dict[str, tuple[str, str, str, KeyMap]] = {
    "t5": ("text_encoder", I2V, "models_t5_umt5-xxl-enc-bf16.pth", keys.TEXT_ENCODER),
    "t5 converted": ("text_encoder", I2V, "models_t5_umt5-xxl-enc-bf16.safetensors", keys.TEXT_ENCODER),
    "t5 diffusers": ("text_encoder", f"{I2V}-Diffusers", "text_encoder/model*.safetensors", SAME_NAMES),
    "vae 2.1": ("vae", "Wan-AI/Wan2.2-T2V-A14B", "Wan2.1_VAE.pth", keys.VAE_2_1),
    "vae 2.1 converted": ("vae", "DiffSynth-Studio/Wan-Series-Converted-Safetensors", "Wan2.1_VAE.safetensors", keys.VAE_2_1),
    "vae 2.1 diffusers": ("vae", f"{I2V}-Diffusers", "vae/diffusion_pytorch_model.safetensors", SAME_NAMES),
    "vae 2.2": ("vae", "Wan-AI/Wan2.2-TI2V-5B", "Wan2.2_VAE.pth", keys.VAE_2_2),
    "vae 2.2 converted": ("vae", "DiffSynth-Studio/Wan-Series-Converted-Safetensors", "Wan2.2_VAE.safetensors", keys.VAE_2_2),
    "vae 2.2 diffusers": ("vae", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "vae/diffusion_pytorch_model.safetensors", SAME_NAMES),
    "clip": ("image_encoder", I2V, f"{CLIP}.pth", keys.IMAGE_ENCODER),
    "clip diffusers": ("image_encoder", f"{I2V}-Diffusers", "image_encoder/model.safetensors", keys.IMAGE_ENCODER_DIFFUSERS),
}  # fmt: skip


def read_tensors(folder: Path, pattern: str) -> dict[str, Tensor]:
    """Return the tensors that torch and safetensors read from the files of a recipe's pattern."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        tensors |= torch.load(path, weights_only=True) if path.suffix == ".pth" else load_file(path)
    assert tensors
    return tensors


def load(base: Path, component: str, model_id: str, pattern: str, table: KeyMap) -> nn.Module:
    """Load a written component by names and shapes as any other, with nothing missing."""
    write_tiny_weights(base, component, model_id, pattern)
    ours: dict[str, Tensor] = {}
    for name, tensor in read_tensors(base / model_id, pattern).items():
        assert table.to_targets(name) is not None
        ours |= table.split(name, tensor.float())
    config_path = (base / model_id / pattern).parent / "config.json"
    files = ComponentFiles(component, "x", (), config_path if config_path.exists() else None)
    module = build(component, config_of(files, {name: tuple(tensor.shape) for name, tensor in ours.items()}))
    missing, unexpected = module.load_state_dict(ours, strict=False)
    assert (set(missing) - {"encoder.embed_tokens.weight"}, unexpected) == (set(), [])
    return module.eval()


def settings_of(module: nn.Module) -> dict[str, object]:
    """Return its configuration, without its origin."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    return {name: value for name, value in config.items() if name != "architectures" and not name.startswith("_")}


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers_are_those_of_their_repositories(tmp_path, case):
    model_id, pattern, expected = TRANSFORMERS[case]
    module = load(tmp_path, "dit", model_id, pattern, SAME_NAMES if "diffusers" in case else keys.DIT)
    assert {name: module.config[name] for name in expected} == expected
    assert (module.config.num_attention_heads, module.config.attention_head_dim) == (2, 16)
    config = read_json((tmp_path / model_id / pattern).parent / "config.json", dict, "")
    assert config["_class_name"] == ("WanTransformer3DModel" if "diffusers" in case else "WanModel")
    # diffusers keeps more of that kind in memory, in an order that differs from process to process
    assert {name for name in config if name.startswith("_")} <= {"_class_name", "_diffusers_version"}


@pytest.mark.parametrize("case", OTHERS)
def test_other_components_load_back_from_shapes_or_their_configuration(tmp_path, case):
    component, model_id, pattern, table = OTHERS[case]
    load(tmp_path, component, model_id, pattern, table)
    assert (tmp_path / model_id / pattern).parent.joinpath("config.json").exists() == ("diffusers" in case)
    names_found = read_tensors(tmp_path / model_id, pattern).keys()
    assert "encoder.embed_tokens.weight" not in names_found
    if case == "clip":
        assert {"visual.head", "log_scale", "textual.head.0.weight"} <= names_found


@pytest.mark.parametrize(
    "cases",
    [
        ("t5", "t5 converted", "t5 diffusers"),
        ("vae 2.1", "vae 2.1 converted", "vae 2.1 diffusers"),
        ("vae 2.2", "vae 2.2 converted", "vae 2.2 diffusers"),
        ("clip", "clip diffusers"),
    ],
    ids=lambda cases: cases[0],
)
def test_each_layout_holds_the_same_weights(tmp_path, cases):
    first, *others = [load(tmp_path, *OTHERS[case]) for case in cases]
    for other in others:
        assert settings_of(first) == settings_of(other)
        for name, tensor in first.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_transformers_of_different_folders_and_repositories_differ(tmp_path):
    weights = [
        load(tmp_path, "dit", *TRANSFORMERS[case][:2], keys.DIT).proj_out.weight
        for case in ("t2v", "t2v high", "t2v low")
    ]
    assert not any(torch.equal(left, right) for left, right in ((weights[0], weights[1]), (weights[1], weights[2])))


@pytest.mark.parametrize(
    ("component", "model_id", "pattern"),
    [("dit", *TRANSFORMERS["flf2v"][:2]), *(OTHERS[case][:3] for case in ("t5", "t5 diffusers", "vae 2.2", "clip"))],
)
def test_the_same_command_writes_the_same_bytes(tmp_path, component, model_id, pattern):
    for number in range(2):
        write_tiny_weights(tmp_path / str(number), component, model_id, pattern)
    first = {
        path.relative_to(tmp_path / "0"): path.read_bytes() for path in (tmp_path / "0").rglob("*") if path.is_file()
    }
    again = {
        path.relative_to(tmp_path / "1"): path.read_bytes() for path in (tmp_path / "1").rglob("*") if path.is_file()
    }
    assert first and first == again


def test_sizes_can_be_chosen(tmp_path):
    sizes = TinySizes(blocks=3, heads=4, head_size=32, text_width=96)
    write_tiny_weights(tmp_path, "dit", *TRANSFORMERS["t2v"][:2], sizes)
    config = read_json(tmp_path / TRANSFORMERS["t2v"][0] / "config.json", dict, "")
    assert (config["dim"], config["num_heads"], config["num_layers"]) == (128, 4, 3)
    assert read_tensors(tmp_path / TRANSFORMERS["t2v"][0], SHARDS)["text_embedding.0.weight"].shape == (128, 96)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """Four photographs, each seen through a moving window: [4, 3, 9, 64, 64], -1 to 1."""
    import numpy as np
    import skimage.data
    from PIL import Image

    images = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        pixels = np.array(Image.fromarray(getattr(skimage.data, name)()[..., :3]).resize((96, 96)))
        images.append(torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1)
    stacked = torch.stack(images)
    return torch.stack(
        [stacked[..., 4 * step : 4 * step + 64, 4 * step : 4 * step + 64] for step in range(8)]
        + [stacked[..., 32:, 32:]],
        dim=2,
    )


@pytest.mark.parametrize("case", ["vae 2.1", "vae 2.2 diffusers"])
@pytest.mark.parametrize("frames", [1, 9])
def test_latents_have_mean_0_and_spread_1_and_tell_clips_apart(tmp_path, clips, case, frames):
    vae = load(tmp_path, *OTHERS[case])
    shape = (1, -1, 1, 1, 1)
    mean, spread = torch.tensor(vae.config.latents_mean).view(shape), torch.tensor(vae.config.latents_std).view(shape)
    with torch.no_grad():
        latents = (vae.encode(clips[:, :, :frames]).latent_dist.mean - mean) / spread
    side = 64 // vae.config.scale_factor_spatial
    assert latents.shape == (4, vae.config.z_dim, 1 + (frames - 1) // 4, side, side)
    assert abs(latents.mean()) < 0.3
    assert 0.7 < latents.std() < 1.3
    assert latents.std(dim=0).mean() > 0.4


@pytest.mark.parametrize("case", ["t5", "t5 diffusers"])
def test_captions_become_different_tokens_that_end_as_umt5_s_do(tmp_path, case):
    component, model_id, pattern, table = OTHERS[case]
    encoder = load(tmp_path, component, model_id, pattern, table)
    place = {"t5": "google/umt5-xxl", "t5 diffusers": "tokenizer"}[case]
    tokenizer = load_tokenizer(tmp_path / model_id / place)
    captions = ["a cat", "a dog", "Köln", "Käln", "猫", "<pad>", ""]
    tokens = [tokenizer(caption)["input_ids"] for caption in captions]
    assert len({tuple(numbers) for numbers in tokens}) == len(captions)
    assert 0.9 < encoder.shared.weight.std() < 1.1  # as UMT5 has it: an embedding has no fan-in
    assert all(numbers[-1] == 1 for numbers in tokens) and tokens[-1] == [1]
    assert 2 not in {number for numbers in tokens for number in numbers}
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == "a cat"
    padded = tokenizer(captions[:2], padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    assert padded["input_ids"].shape == (2, 512) and int(padded["input_ids"].max()) < encoder.config.vocab_size
    with torch.no_grad():
        states = encoder(padded["input_ids"], padded["attention_mask"]).last_hidden_state[:, :2]
    assert (states[0] - states[1]).std() > 0.3 * states.std()


def test_the_tokenizer_that_pipelines_load_gives_the_same_tokens_for_known_characters(tmp_path):
    from transformers import AutoTokenizer

    load(tmp_path, *OTHERS["t5 diffusers"])
    folder = tmp_path / OTHERS["t5 diffusers"][1] / "tokenizer"
    theirs, ours = AutoTokenizer.from_pretrained(folder, local_files_only=True), load_tokenizer(folder)
    for caption in ("a cat on a mat", "A  dog, running!\nfast", "", "word " * 300):
        assert ours(caption)["input_ids"] == theirs(caption)["input_ids"]


def test_images_stay_apart_in_clip_as_its_processor_prepares_them(tmp_path):
    from PIL import Image
    from transformers import CLIPImageProcessor

    encoder = load(tmp_path, *OTHERS["clip diffusers"])
    processor = CLIPImageProcessor.from_pretrained(tmp_path / OTHERS["clip diffusers"][1] / "image_processor")
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "navy")]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = encoder(pixels, output_hidden_states=True).hidden_states[-2]
    assert states.shape == (2, 257, 32)
    assert (states[0] - states[1]).std() > 0.3 * states.std()


@pytest.mark.parametrize("case", ["t2v", "i2v", "flf2v", "ti2v"])
def test_a_first_loss_is_near_that_of_predicting_nothing(tmp_path, case):
    torch.manual_seed(0)
    transformer = load(tmp_path, "dit", *TRANSFORMERS[case][:2], keys.DIT)
    config = transformer.config
    clean, noise = torch.randn(2, 4, config.out_channels, 3, 8, 8)
    given = torch.randn(4, config.in_channels - config.out_channels, 3, 8, 8)
    text = torch.randn(4, 512, 64)
    count = {"i2v": 4, "flf2v": 8}.get(case, 0)
    images = torch.randn(count, 257, 32) if count else None
    with torch.no_grad():
        noisy = torch.cat([(clean + noise) / 2, given], dim=1)
        predicted = transformer(noisy, torch.full((4,), 500.0), text, images).sample
    target = noise - clean
    loss = (predicted - target).square().mean() / target.square().mean()
    assert 0.9 < loss < 1.3
    assert (predicted[0] - predicted[1]).std() > 0.3 * predicted.std()
