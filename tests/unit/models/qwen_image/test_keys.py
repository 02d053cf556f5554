"""Qwen-Image's keys: text encoder keys of old and new releases, unused modules, LoRA targets."""

import pytest

from diffsynth_core.models.qwen_image.keys import LAST_TEXT_MODULES, LORA_TARGETS, TEXT_ENCODER_FILES, dead_modules
from diffsynth_core.models.qwen_image.spec import QWEN_IMAGE
from diffsynth_core.models.recognition import component_at, family_of_model, recognize, recognize_family
from diffsynth_core.models.registry import FAMILIES, unknown_family
from diffsynth_core.models.spec import match_targets, modules_with_weights

DIT = {"transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "img_in.weight", "proj_out.weight"}
CONTROLNET = DIT - {"proj_out.weight"} | {"controlnet_x_embedder.weight", "controlnet_blocks.0.weight"}
OLD_TEXT_ENCODER = {"model.embed_tokens.weight", "visual.patch_embed.proj.weight", "lm_head.weight"}
NEW_TEXT_ENCODER = {"model.language_model.embed_tokens.weight", "model.visual.patch_embed.proj.weight"}
VAE = {"encoder.conv_in.weight", "encoder.norm_out.gamma", "post_quant_conv.weight"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("model.layers.27.mlp.down_proj.weight", "model.language_model.layers.27.mlp.down_proj.weight"),
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("visual.blocks.0.attn.qkv.bias", "model.visual.blocks.0.attn.qkv.bias"),
        ("visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_text_encoder_names_of_both_styles_become_ours(old, new):
    assert TEXT_ENCODER_FILES.to_targets(old) == (new,)
    assert TEXT_ENCODER_FILES.to_targets(new) == (new,)


def test_all_names_of_the_tiny_text_encoder_find_their_place(tiny_models):
    import torch

    from diffsynth_core.json_files import read_json
    from diffsynth_core.models.qwen_image.components import build
    from diffsynth_core.weights.headers import read_headers

    folder = next(tiny_models.glob("*/*/text_encoder"))
    names = read_headers(sorted(folder.glob("*.safetensors")))
    assert any(name.startswith("visual.") for name in names)  # the style of the published files
    with torch.device("meta"):
        module = build("text_encoder", read_json(folder / "config.json", dict, ""))
    assert sorted(own for name in names for own in TEXT_ENCODER_FILES.to_targets(name)) == sorted(module.state_dict())


@pytest.mark.parametrize(
    "names",
    [
        {"transformer_blocks.0.attn.to_q", "transformer_blocks.2.attn.to_q", "transformer_blocks.10.attn.to_q"},
        {"transformer_blocks.10.attn.to_q.weight", "transformer_blocks.9.txt_mlp.net.2.bias", "img_in.weight"},
    ],
)
def test_dead_modules_are_those_of_the_last_block(names):
    dead = dead_modules(frozenset(names))
    assert dead == {f"transformer_blocks.10.{module}" for module in LAST_TEXT_MODULES}


@pytest.mark.parametrize("names", [set(), {"img_in", "model.layers.3.mlp", "x.transformer_blocks.3.attn"}])
def test_without_blocks_nothing_is_dead(names):
    assert dead_modules(frozenset(names)) == frozenset()


def test_dead_modules_are_exactly_those_that_no_gradient_reaches(tiny_models):
    import torch

    from diffsynth_core.json_files import read_json
    from diffsynth_core.models.qwen_image.components import build
    from diffsynth_core.models.qwen_image.forward import predict_velocity

    torch.manual_seed(0)
    config = read_json(next(tiny_models.glob("*/*/transformer")) / "config.json", dict, "")
    module = build("dit", config).train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch = {"prompt_embeds": torch.randn(1, 5, config["joint_attention_dim"])}
    noisy = torch.randn(1, 16, 1, 4, 6)
    predict_velocity(module, noisy, torch.tensor([0.5]), batch).pow(2).sum().backward()
    silent = {
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not parameter.grad.count_nonzero()
    }
    dead = dead_modules(frozenset(name for name, _ in module.named_modules()))
    of_dead = {name for name, _ in module.named_parameters() if name.rpartition(".")[0] in dead}
    assert of_dead and of_dead == silent


def test_the_documented_lora_targets():
    documented = "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1"
    assert ",".join(LORA_TARGETS) == documented
    assert QWEN_IMAGE.component("dit").lora_targets == LORA_TARGETS


def test_targets_are_ends_of_dotted_names():
    modules = frozenset({"a.to_q", "b.0.to_q", "to_q", "a.xto_q", "a.to_q.0", "a.to_out.0"})
    assert match_targets(modules, ("to_q", "to_out.0", "gone")) == {
        "to_q": ["a.to_q", "b.0.to_q", "to_q"],
        "to_out.0": ["a.to_out.0"],
        "gone": [],
    }


def test_modules_that_can_carry_a_lora_have_a_matrix_or_a_convolution():
    shapes = {"a.weight": (2, 3), "a.bias": (2,), "norm.weight": (3,), "conv.weight": (1, 2, 3, 3), "time.weight": (1, 2, 3, 1, 1),
              "odd.weight": (1, 2, 3), "gamma": (3, 3), "weight": (2, 2)}  # fmt: skip
    assert modules_with_weights(shapes) >= {"a", "conv", "time"}
    assert not modules_with_weights(shapes) & {"norm", "odd", "gamma"}


@pytest.mark.parametrize(
    ("names", "component"),
    [
        (DIT, "dit"),
        (OLD_TEXT_ENCODER, "text_encoder"),
        (NEW_TEXT_ENCODER, "text_encoder"),
        (VAE, "vae"),
        (CONTROLNET, "controlnet"),
        (DIT - {"img_in.weight"}, None),
        (set(), None),
    ],
)
def test_components_are_recognized_by_their_names(names, component):
    found = recognize(names, QWEN_IMAGE)
    assert (found[0].name if found else None) == component
    family = recognize_family(names)
    assert (family.name if family else None) == ("qwen-image" if component == "dit" else None)


@pytest.mark.parametrize(
    ("place", "component"),
    [
        ("transformer/diffusion_pytorch_model*.safetensors", "dit"),
        ("text_encoder/model*.safetensors", "text_encoder"),
        ("vae/diffusion_pytorch_model.safetensors", "vae"),
        ("controlnet/diffusion_pytorch_model.safetensors", "controlnet"),
        ("diffusion_pytorch_model*.safetensors", "dit"),
        ("tokenizer/vocab.json", None),
    ],
)
def test_components_are_known_by_their_place(place, component):
    found = component_at(place, QWEN_IMAGE)
    assert (found.name if found else None) == component


@pytest.mark.parametrize(
    ("model_id", "component"),
    [
        ("InstantX/Qwen-Image-ControlNet-Union", "controlnet"),
        ("jasperai/Flux.1-dev-Controlnet-Upscaler", "controlnet"),
        ("DiffSynth-Studio/Qwen-Image-Distill-Full", "dit"),
    ],
)
def test_a_place_that_all_have_is_told_by_its_repository(model_id, component):
    assert component_at("diffusion_pytorch_model.safetensors", QWEN_IMAGE, model_id).name == component


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("qwen-imag", "did you mean `qwen-image`?"),
        ("", f"known: {', '.join(FAMILIES)}"),
        ("zzz", f"known: {', '.join(FAMILIES)}"),
    ],
)
def test_a_family_that_is_not_there_is_told_with_those_that_are(name, hint):
    problem = unknown_family(name)
    assert problem.message == f"unknown family `{name}`"
    assert problem.hint == hint
    assert problem.wrong_use


@pytest.mark.parametrize(
    ("model_id", "family"),
    [
        ("Qwen/Qwen-Image", "qwen-image"),
        ("Qwen/Qwen-Image-2512", "qwen-image"),
        ("Qwen/Qwen3-4B", None),
        ("black-forest-labs/FLUX.1-dev", "flux"),
    ],
)
def test_families_are_known_by_the_repositories_of_their_models(model_id, family):
    found = family_of_model(model_id)
    assert (found.name if found else None) == family
