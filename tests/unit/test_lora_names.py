"""The dialects of LoRA files: literal keys are written, read keys find their module, strangers are counted."""

import pytest

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.state_dicts.key_maps import TableMap
from diffsynth_core.state_dicts.lora_names import (
    DIALECTS,
    LoraKeys,
    LoraNaming,
    find_lora_keys,
    lora_keys,
    refuse_other_adapters,
)

MODULES = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.10.img_mlp.net.0.proj",
    "transformer_blocks.1.attn.to_q",
    "img_in",
)

WRITTEN = {
    "diffsynth": (
        "transformer_blocks.0.attn.to_q.lora_A.default.weight",
        "transformer_blocks.0.attn.to_q.lora_B.default.weight",
        None,
    ),
    "diffusers": (
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
        None,
    ),
    "comfyui": (
        "diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight",
        "diffusion_model.transformer_blocks.0.attn.to_q.lora_B.weight",
        None,
    ),
    "kohya": (
        "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight",
        "lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight",
        "lora_unet_transformer_blocks_0_attn_to_q.alpha",
    ),
}


def written(dialect: str, modules=MODULES) -> list[str]:
    keys = [part for module in modules for part in lora_keys(module, dialect)]
    return [key for each in keys for key in (each.down, each.up, each.alpha) if key]


def test_the_documented_dialects_are_all_there():
    assert list(DIALECTS) == list(WRITTEN)


@pytest.mark.parametrize("dialect", WRITTEN)
def test_written_keys(dialect):
    assert lora_keys(MODULES[0], dialect) == (LoraKeys(*WRITTEN[dialect]),)


@pytest.mark.parametrize("dialect", WRITTEN)
def test_every_dialect_is_found_again(dialect):
    assert find_lora_keys(written(dialect), MODULES) == (
        dialect,
        {module: lora_keys(module, dialect) for module in MODULES},
        [],
    )


@pytest.mark.parametrize("dialect", WRITTEN)
def test_a_lora_on_some_modules_is_found(dialect):
    _, found, unmatched = find_lora_keys(reversed(written(dialect, MODULES[:2])), MODULES)
    assert set(found) == set(MODULES[:2]) and unmatched == []


@pytest.mark.parametrize(
    ("down", "up", "alpha"),
    [
        ("pipe.dit.{}.lora_A.default.weight", "pipe.dit.{}.lora_B.default.weight", None),
        ("{}.lora_A.weight", "{}.lora_B.weight", None),
        ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", "diffusion_model.{}.alpha"),
        ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", "diffusion_model.{}.alpha"),
    ],
)
def test_spellings_that_are_read_though_not_written(down, up, alpha):
    spellings = [text for text in (down, up, alpha) if text]
    keys = [text.format(module) for module in MODULES for text in spellings]
    _, found, unmatched = find_lora_keys(keys, MODULES)
    assert unmatched == []
    assert found == {
        module: (LoraKeys(down.format(module), up.format(module), alpha.format(module) if alpha else None),)
        for module in MODULES
    }


PARTS = LoraNaming(
    "dit",
    {
        "diffusers": TableMap({"img_in": "x_embedder"}, stacked={"a.{}.qkv": ("b.{}.q", "b.{}.k")}),
        "kohya": TableMap({"img_in": "img_in", "a.{}.qkv": "c.{}.qkv"}),
        "comfyui": None,
    },
)


@pytest.mark.parametrize(
    ("dialect", "stems"),
    [
        ("diffsynth", ["a.7.qkv"]),
        ("diffusers", ["transformer.b.7.q", "transformer.b.7.k"]),
        ("kohya", ["lora_unet_c_7_qkv"]),
    ],
)
def test_a_dialect_has_its_own_names_for_a_module_or_for_its_parts(dialect, stems):
    ends = DIALECTS[dialect].down, DIALECTS[dialect].up
    alphas = [f"{stem}.alpha" if dialect == "kohya" else None for stem in stems]
    expected = tuple(LoraKeys(stem + ends[0], stem + ends[1], alpha) for stem, alpha in zip(stems, alphas, strict=True))
    assert lora_keys("a.7.qkv", dialect, PARTS) == expected
    keys = [key for part in expected for key in (part.down, part.up, part.alpha) if key]
    modules = ["a.6.qkv", "a.7.qkv", "img_in"]
    assert find_lora_keys(keys, modules, PARTS) == (dialect, {"a.7.qkv": expected}, [])


def test_a_part_that_is_not_there_has_no_keys():
    key = "transformer.b.7.k.lora_B.weight"
    assert find_lora_keys([key], ["a.7.qkv"], PARTS) == (
        "diffusers",
        {"a.7.qkv": (LoraKeys(), LoraKeys(up=key))},
        [],
    )


def test_a_dialect_without_names_is_neither_written_nor_read():
    assert [name for name in DIALECTS if PARTS.known(name)] == ["diffsynth", "diffusers", "kohya"]
    keys = [f"diffusion_model.img_in.lora_{half}.weight" for half in "AB"]
    assert find_lora_keys(keys, ["img_in"]) == ("comfyui", {"img_in": (LoraKeys(*keys),)}, [])
    assert find_lora_keys(keys, ["img_in"], PARTS)[1:] == ({}, keys)
    with pytest.raises(KeyError, match="comfyui"):
        lora_keys("img_in", "comfyui", PARTS)


@pytest.mark.parametrize("component", ["dit", "text_encoder"])
def test_the_prefix_of_a_checkpoint_is_that_of_the_component(component):
    keys = [f"pipe.{component}.img_in.lora_{half}.default.weight" for half in "AB"]
    assert find_lora_keys(keys, MODULES, LoraNaming(component)) == ("diffsynth", {"img_in": (LoraKeys(*keys),)}, [])
    assert find_lora_keys(keys, MODULES, LoraNaming("vae"))[1:] == ({}, keys)


def test_underscores_are_resolved_against_the_modules_that_are_there():
    modules = ["blocks.0.to_q", "blocks.0.mlp.fc_1", "blocks_extra.0"]
    keys = [
        "lora_unet_blocks_0_to_q.lora_up.weight",
        "lora_unet_blocks_0_mlp_fc_1.alpha",
        "lora_unet_blocks_extra_0.alpha",
    ]
    dialect, found, unmatched = find_lora_keys(keys, modules)
    assert dialect == "kohya"
    assert found == {
        "blocks.0.to_q": (LoraKeys(up=keys[0]),),
        "blocks.0.mlp.fc_1": (LoraKeys(alpha=keys[1]),),
        "blocks_extra.0": (LoraKeys(alpha=keys[2]),),
    }
    assert unmatched == []


@pytest.mark.parametrize("dialect", WRITTEN)
@pytest.mark.parametrize(
    "stranger",
    [
        "transformer_blocks.99.attn.to_q.lora_A.default.weight",
        "lora_te_text_model_encoder_layers_0.lora_down.weight",
        "transformer_blocks.0.attn.to_q.weight",
        "pipe.text_encoder.model.norm.weight",
        "alpha",
        "",
    ],
)
def test_keys_that_fit_no_module_are_told(dialect, stranger):
    name, found, unmatched = find_lora_keys([*written(dialect), stranger], MODULES)
    assert name == dialect
    assert set(found) == set(MODULES)
    assert unmatched == [stranger]


def test_a_missing_half_is_none():
    _, found, unmatched = find_lora_keys([WRITTEN["diffusers"][1]], MODULES)
    assert found == {MODULES[0]: (LoraKeys(up=WRITTEN["diffusers"][1]),)}
    assert unmatched == []


@pytest.mark.parametrize("dialect", WRITTEN)
def test_nothing_is_found_for_another_model(dialect):
    keys = written(dialect)
    _, found, unmatched = find_lora_keys(keys, ["blocks.0.self_attn.q"])
    assert found == {}
    assert unmatched == keys


def test_an_empty_file_is_of_the_documented_dialect_and_has_nothing_unmatched():
    assert find_lora_keys([], MODULES) == ("diffsynth", {}, [])


def test_the_module_names_of_qwen_image_stay_distinct_with_underscores(tiny_models):
    from diffsynth_core.families.interface import modules_with_weights
    from diffsynth_core.state_dicts.headers import read_headers

    paths = sorted(tiny_models.glob("*/*/transformer/*.safetensors"))
    modules = modules_with_weights({name: tensor.shape for name, tensor in read_headers(paths).items()})
    assert len(modules) > 30
    assert len({module.replace(".", "_") for module in modules}) == len(modules)


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("lora_unet_blocks_0_q.lokr_w1", "LoKr"),
        ("diffusion_model.blocks.0.q.lokr_w2_a", "LoKr"),
        ("lora_unet_blocks_0_q.hada_w1_a", "LoHa"),
        ("lora_unet_blocks_0_q.dora_scale", "DoRA"),
        ("transformer.blocks.0.q.lora_magnitude_vector", "DoRA"),
        ("lora_unet_blocks_0_q.lora_mid.weight", "LoRA with a core tensor (Tucker decomposition)"),
        ("lora_unet_blocks_0_q.oft_blocks", "OFT"),
        ("diffusion_model.blocks.0.q.diff_b", "LoRA with changes of biases"),
    ],
)
def test_adapters_that_are_more_than_a_lora_are_refused_by_name(key, title):
    with pytest.raises(DiffSynthError) as raised:
        refuse_other_adapters("mine.safetensors", [*written("kohya"), key])
    assert raised.value.problems[0].message == (
        f"`mine.safetensors`: it is a {title}, told by `{key}`; only a LoRA is read here"
    )


@pytest.mark.parametrize("dialect", WRITTEN)
def test_a_plain_lora_is_not_refused_but_for_one_key_more(dialect):
    refuse_other_adapters("mine.safetensors", written(dialect))
    with pytest.raises(DiffSynthError):
        refuse_other_adapters("mine.safetensors", [*written(dialect), "blocks.0.q.lokr_w1"])


FUSED = LoraNaming(
    "dit",
    fused={"kohya": TableMap({"img_in": "x"}, stacked={"a.{}.qkv": ("b.{}.q", "b.{}.k")})},
    modules=("b.{}.q", "b.{}.k", "x"),
)


def test_a_dialect_can_have_several_modules_as_one():
    keys = [f"lora_unet_a_7_qkv.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")]
    both = (LoraKeys(*keys, fused="a.7.qkv"),)
    assert find_lora_keys(keys, FUSED.modules_met(keys), FUSED) == ("kohya", {"b.7.q": both, "b.7.k": both}, [])
    assert FUSED.known("kohya") and not FUSED.written("kohya") and FUSED.written("comfyui")


def test_the_modules_that_a_file_may_mean_have_the_numbers_of_its_keys():
    assert FUSED.modules_met(["lora_unet_a_7_qkv.alpha", "b.12.q.lora_A.weight"]) == [
        "b.7.q", "b.12.q", "b.7.k", "b.12.k", "x",
    ]  # fmt: skip
    assert FUSED.modules_met(["x.lora_A.weight"]) == ["x"]
