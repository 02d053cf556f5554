"""Wan at its published sizes, on the meta device: inferred configurations, exact parameter counts, both layouts."""

import json
from functools import cache

import pytest
import torch
from torch import nn

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import DiffSynthError, collect_problems
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.shapes import infer_t5_encoder
from diffsynth_core.models.spec import ComponentFiles
from diffsynth_core.models.wan import keys
from diffsynth_core.models.wan.components import (
    build,
    config_of,
    infer_image_encoder,
    infer_transformer,
    infer_vae,
    load_tokenizer,
)
from diffsynth_core.planning.model.components import find_components
from diffsynth_core.weights.key_maps import TableMap

TRANSFORMER = {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}
SMALL = {
    **TRANSFORMER,
    "num_attention_heads": 12,
    "in_channels": 16,
    "out_channels": 16,
    "ffn_dim": 8960,
    "num_layers": 30,
}
LARGE = {
    **TRANSFORMER,
    "num_attention_heads": 40,
    "in_channels": 16,
    "out_channels": 16,
    "ffn_dim": 13824,
    "num_layers": 40,
}
IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
VAE_2_1 = {
    "base_dim": 96, "decoder_base_dim": None, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "temperal_downsample": [False, True, True], "is_residual": False, "in_channels": 3, "out_channels": 3,
    "patch_size": None, "scale_factor_temporal": 4, "scale_factor_spatial": 8,
}  # fmt: skip
VAE_2_2 = VAE_2_1 | {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16,
}  # fmt: skip
CONSTANTS_48 = {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
TEXT = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
CLIP = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 224, "hidden_act": "gelu",
}  # fmt: skip
PUBLISHED: dict[str, tuple[str, dict[str, object], int]] = {
    "2.1 t2v 1.3b": ("dit", SMALL, 1418996800),
    "2.1 t2v 14b": ("dit", LARGE, 14288491584),
    "2.1 i2v 14b": ("dit", LARGE | IMAGE, 16394878784),
    "2.1 flf2v 14b": ("dit", LARGE | IMAGE | {"pos_embed_seq_len": 514}, 16394878784 + 514 * 1280),
    "2.2 i2v a14b": ("dit", LARGE | {"in_channels": 36}, 14288901184),
    "2.2 ti2v 5b": (
        "dit",
        LARGE | {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30},
        4999787712,
    ),
    "2.1 vae": ("vae", VAE_2_1, 126892531),
    "2.2 vae": ("vae", VAE_2_2, 704688668),
    "umt5-xxl": ("text_encoder", TEXT, 5680910336),
    "clip-h vision": ("image_encoder", CLIP, 630766080),
}
INFER = {
    "dit": infer_transformer,
    "vae": infer_vae,
    "text_encoder": infer_t5_encoder,
    "image_encoder": infer_image_encoder,
}
TABLES = {
    "2.1 vae": keys.VAE_2_1,
    "2.2 vae": keys.VAE_2_2,
    "umt5-xxl": keys.TEXT_ENCODER,
    "clip-h vision": keys.IMAGE_ENCODER,
}


@cache
def published(case: str) -> nn.Module:
    """Build a component with its library from the published config, on the meta device."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    component, settings, _ = PUBLISHED[case]
    with torch.device("meta"):
        if component == "dit":
            return WanTransformer3DModel(**settings)
        if component == "vae":
            return AutoencoderKLWan(**settings, **(CONSTANTS_48 if settings["z_dim"] == 48 else {}))
        if component == "text_encoder":
            return UMT5EncoderModel(UMT5Config(**settings))
        return CLIPVisionModel(CLIPVisionConfig(**settings))


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return shapes as in a file: the tied embedding of UMT5 once."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }


def original_shapes(case: str) -> dict[str, tuple[int, ...]]:
    """Return keys and shapes of Wan's own file."""
    table: TableMap = TABLES.get(case, keys.DIT)
    tensors = published(case).state_dict()
    theirs = {table.to_source(name) for name in shapes_of(published(case))}
    return {name: tuple(table.fuse(name, tensors).shape) for name in theirs if name}


def plain(config: object, keys: dict[str, object]) -> dict[str, object]:
    """Return the same keys of a library's configuration, with sequences as lists."""
    values = {name: getattr(config, name) for name in keys}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_published_sizes(case):
    assert sum(parameter.numel() for parameter in published(case).parameters()) == PUBLISHED[case][2]


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_published_configuration_is_inferred_and_builds_the_same_module(case):
    component, settings, _ = PUBLISHED[case]
    module = published(case)
    found = INFER[component](shapes_of(module))
    assert {name: found[name] for name in settings} == settings
    constants = {"latents_mean", "latents_std"} if component == "vae" else set()
    reported = {name: value for name, value in found.items() if name not in constants}
    assert plain(module.config, reported) == reported
    with torch.device("meta"):
        rebuilt = build(component, found)
    assert type(rebuilt) is type(module)
    assert shapes_of(rebuilt) == shapes_of(module)


@pytest.mark.parametrize("case", PUBLISHED)
def test_files_in_wan_s_own_names_infer_the_same(case):
    component = PUBLISHED[case][0]
    table = TABLES.get(case, keys.DIT)
    theirs = original_shapes(case)
    assert theirs.keys() != shapes_of(published(case)).keys()
    ours: dict[str, tuple[int, ...]] = {}
    for name, shape in theirs.items():
        ours |= table.split_shape(name, shape)
    assert ours == shapes_of(published(case))
    assert INFER[component](ours) == INFER[component](shapes_of(published(case)))


def test_the_image_half_of_wan_s_clip_file_has_its_projection_and_scale_besides():
    shapes = {**original_shapes("clip-h vision"), "visual.head": (1280, 1024), "log_scale": ()}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 632076801


def test_the_vae_s_constants_are_those_of_the_published_ones():
    from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

    with torch.device("meta"):
        first = build("vae", infer_vae(shapes_of(published("2.1 vae")))).config
        second = build("vae", infer_vae(shapes_of(published("2.2 vae")))).config
        own, qwen = AutoencoderKLWan().config, AutoencoderKLQwenImage().config
    for config in (own, qwen):
        assert (first.latents_mean, first.latents_std) == (config.latents_mean, config.latents_std)
    assert len(second.latents_mean) == len(second.latents_std) == 48
    assert [second.latents_mean[place] for place in (0, 19, 47)] == [-0.2289, 0.5109, -0.0667]
    assert [second.latents_std[place] for place in (0, 39, 47)] == [0.4765, 1.6887, 0.7744]
    assert min(second.latents_std) == 0.3523


OWN_CONFIGS = {
    "2.1 t2v 1.3b": {"dim": 1536, "ffn_dim": 8960, "in_dim": 16, "model_type": "t2v", "num_heads": 12, "num_layers": 30, "out_dim": 16},
    "2.1 t2v 14b": {"dim": 5120, "ffn_dim": 13824, "in_dim": 16, "model_type": "t2v", "num_heads": 40, "num_layers": 40, "out_dim": 16},
    "2.1 i2v 14b": {"dim": 5120, "ffn_dim": 13824, "in_dim": 36, "model_type": "i2v", "num_heads": 40, "num_layers": 40, "out_dim": 16},
    "2.1 flf2v 14b": {"dim": 5120, "ffn_dim": 13824, "in_dim": 36, "model_type": "flf2v", "num_heads": 40, "num_layers": 40, "out_dim": 16},
    "2.2 i2v a14b": {"dim": 5120, "ffn_dim": 13824, "in_dim": 36, "model_type": "i2v", "num_heads": 40, "num_layers": 40, "out_dim": 16},
    "2.2 ti2v 5b": {"dim": 3072, "ffn_dim": 14336, "in_dim": 48, "model_type": "ti2v", "num_heads": 24, "num_layers": 30, "out_dim": 48},
}  # fmt: skip
COMMON = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "eps": 1e-06, "freq_dim": 256, "text_len": 512}


def files_with(folder, component: str, config: dict[str, object]) -> ComponentFiles:
    (folder / "config.json").write_text(json.dumps(config))
    return ComponentFiles(component, "x", (), folder / "config.json")


@pytest.mark.parametrize("case", OWN_CONFIGS)
def test_wan_s_own_configuration_tells_the_same(tmp_path, case):
    shapes = shapes_of(published(case))
    found = config_of(files_with(tmp_path, "dit", COMMON | OWN_CONFIGS[case]), shapes)
    assert found == infer_transformer(shapes) | {"eps": 1e-06}
    assert {name: found[name] for name in PUBLISHED[case][1]} == PUBLISHED[case][1]


def test_wan_s_own_configuration_tells_what_shapes_do_not(tmp_path):
    config = COMMON | OWN_CONFIGS["2.1 t2v 1.3b"] | {"num_heads": 24, "eps": 1e-5}
    found = config_of(files_with(tmp_path, "dit", config), shapes_of(published("2.1 t2v 1.3b")))
    assert (found["num_attention_heads"], found["attention_head_dim"], found["eps"]) == (24, 64, 1e-5)


@pytest.mark.parametrize("component", INFER)
def test_a_configuration_of_the_libraries_goes_first(tmp_path, component):
    config = {"_class_name": "WanTransformer3DModel", "num_layers": 7}
    assert config_of(files_with(tmp_path, component, config), {}) == config


@pytest.mark.parametrize(
    ("width", "heads", "head_size"), [(1536, 12, 128), (192, 3, 64), (96, 3, 32), (64, 1, 64), (32, 1, 32)]
)
def test_the_size_of_a_head_is_a_rule(width, heads, head_size):
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        module = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=width, num_layers=1)
    found = infer_transformer(shapes_of(module))
    assert (found["num_attention_heads"], found["attention_head_dim"]) == (heads, head_size)


@pytest.mark.parametrize(
    "changes",
    [
        {"base_dim": 8},
        {"base_dim": 8, "dim_mult": [1, 2, 2], "temperal_downsample": [True, False], "scale_factor_temporal": 2, "scale_factor_spatial": 4},
        {"base_dim": 8, "num_res_blocks": 1},
        {"base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"is_residual": True, "decoder_base_dim": 16, "in_channels": 12, "out_channels": 12, "patch_size": 2},
    ],
)
def test_other_sizes_of_the_vae_are_inferred_too(changes, kind):
    from diffusers import AutoencoderKLWan

    settings = {**changes, **kind}
    settings["scale_factor_spatial"] = changes.get("scale_factor_spatial", 8) * kind.get("patch_size", 1)
    with torch.device("meta"):
        module = AutoencoderKLWan(**settings)
    found = infer_vae(shapes_of(module))
    assert {name: found[name] for name in settings} == settings
    with torch.device("meta"):
        assert shapes_of(build("vae", found)) == shapes_of(module)


TINY_TEXT = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2}
TINY_CLIP = CLIP | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "image_size": 28}


def test_sizes_of_umt5_that_are_not_multiples_of_each_other_are_inferred():
    with torch.device("meta"):
        module = build("text_encoder", TINY_TEXT | {"d_kv": 6})
    found = infer_t5_encoder(shapes_of(module))
    assert {name: found[name] for name in TINY_TEXT} == TINY_TEXT | {"d_kv": 6}


def test_the_text_encoder_reads_the_embedding_its_files_have():
    """Files have `tie_word_embeddings: false`, about a decoder's head, and contain only `shared.weight`."""
    config = TINY_TEXT | {
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "architectures": ["UMT5EncoderModel"],
    }
    module = build("text_encoder", config | {"model_type": "umt5"})
    assert module.encoder.embed_tokens.weight is module.shared.weight
    assert module.dtype == torch.float32


def test_training_the_text_encoder_switches_no_dropout_on():
    module = build("text_encoder", TINY_TEXT | {"dropout_rate": 0.1})
    load_family("wan").checkpoint_gradients("text_encoder", module)
    assert module.training
    tokens = torch.arange(12).view(1, 12)
    outputs = [module(tokens).last_hidden_state for _ in range(2)]
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0], module.eval()(tokens).last_hidden_state)


@pytest.mark.parametrize(
    ("component", "config", "inputs"),
    [
        ("text_encoder", TINY_TEXT, (torch.arange(12).view(1, 12),)),
        ("image_encoder", TINY_CLIP, (torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28),)),
        (
            "dit",
            {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 24},
            (torch.linspace(-1, 1, 16 * 32).view(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.ones(1, 3, 8)),
        ),
    ],
)
def test_recomputing_activations_changes_no_gradient(component, config, inputs):
    torch.manual_seed(0)
    module = build(component, config).eval()
    saved: list[list[torch.Tensor]] = []
    for recompute in (False, True):
        if recompute:
            load_family("wan").checkpoint_gradients(component, module)
        module.zero_grad()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            loss = module(*inputs)[0].pow(2).sum()
        saved.append([torch.tensor(float(len(kept)))])
        loss.backward()
        saved[-1] += [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    (count, *plain_gradients), (fewer, *gradients) = saved
    assert fewer < count
    assert all(torch.equal(left, right) for left, right in zip(plain_gradients, gradients, strict=True))


def test_nothing_is_recomputed_in_the_vae():
    module = build("vae", {"base_dim": 4}).eval()
    load_family("wan").checkpoint_gradients("vae", module)
    assert not module.training


@pytest.mark.parametrize("files", [{}, {"spiece.model": b"x"}, {"tokenizer.json": b"{"}])
def test_a_folder_without_a_tokenizer_is_told(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DiffSynthError, match="cannot read the tokenizer in"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("class_name", ["WanModel", "VaceWanModel"])
def test_the_configuration_at_the_root_is_that_of_the_transformer_alone(tmp_path, class_name):
    """Wan's own repositories have one config.json in the folder of all components."""
    model = "Wan-AI/Wan2.1-T2V-1.3B"
    files = {"dit": "diffusion_pytorch_model*.safetensors", "vae": "Wan2.1_VAE.pth"}
    for component, place in files.items():
        load_family("wan").write_tiny_weights(tmp_path, component, model, place)
    config = tmp_path / model / "config.json"
    config.write_text(config.read_text().replace("WanModel", class_name))
    parameters = Parameters(model_id_with_origin_paths=tuple(f"{model}:{place}" for place in files.values()))
    with collect_problems():
        found = find_components(parameters, "wan", tmp_path)
    assert {name: component.config_path for name, component in found.components.items()} == {"dit": config, "vae": None}
