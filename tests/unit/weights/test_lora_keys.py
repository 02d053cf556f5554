"""Formats of LoRA files: literal keys are written, keys match their modules, unknown ones are counted."""

from typing import get_args

import pytest

from diffsynth_core.config.choices import LoraFormat
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.weights.key_maps import TableMap
from diffsynth_core.weights.lora_formats import DIT, LORA_FORMATS, PREFIXES, LoraKeys, LoraNaming, lora_keys
from diffsynth_core.weights.lora_keys import LoraMatch, match_lora_keys, refuse_other_adapters

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


def written(lora_format: str, modules=MODULES) -> list[str]:
    keys = [part for module in modules for part in lora_keys(module, lora_format)]
    return [key for each in keys for key in (each.A, each.B, each.alpha) if key]


def test_every_format_that_options_name_is_declared():
    assert tuple(LORA_FORMATS) == get_args(LoraFormat)


def test_without_modules_a_module_is_whatever_precedes_the_ending():
    keys = ["lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight", "lora_unet_x.alpha", "y.lora_A.weight"]
    match = match_lora_keys([*keys, "y.lora_down.weight", "z.diff", "z.weight"], None)
    assert match.loras == {"lora_unet_x": LoraKeys(keys[0], keys[1], keys[2]), "y": LoraKeys(A=keys[3])}
    assert match.unmatched == ("y.lora_down.weight", "z.diff", "z.weight") and match.repeated == ("y.lora_down.weight",)


def test_the_documented_dialects_are_all_there():
    assert list(LORA_FORMATS) == list(WRITTEN)


@pytest.mark.parametrize("lora_format", WRITTEN)
def test_written_keys(lora_format):
    assert lora_keys(MODULES[0], lora_format) == (LoraKeys(*WRITTEN[lora_format]),)


def matched(match: LoraMatch, naming: LoraNaming = DIT) -> tuple[str | None, dict[str, LoraKeys], list[str]]:
    """Return format, keys by module, unmatched keys."""
    return match.lora_format(naming), dict(match.loras), list(match.unmatched)


@pytest.mark.parametrize("lora_format", WRITTEN)
def test_every_dialect_is_found_again(lora_format):
    found = {module: lora_keys(module, lora_format)[0] for module in MODULES}
    assert matched(match_lora_keys(written(lora_format), MODULES)) == (lora_format, found, [])


@pytest.mark.parametrize("lora_format", WRITTEN)
def test_a_lora_on_some_modules_is_found(lora_format):
    match = match_lora_keys(reversed(written(lora_format, MODULES[:2])), MODULES)
    assert set(match.loras) == set(MODULES[:2]) and match.unmatched == ()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_down.weight", "lora_up.weight"),
        ("lora.down.weight", "lora.up.weight"),
    ],
)
@pytest.mark.parametrize("underscores", [False, True])
def test_prefix_ending_and_underscores_are_independent(prefix, down, up, underscores):
    ends = (down, up, "alpha")
    expected = {}
    for module in MODULES:
        stem = prefix.format(component="dit") + (module.replace(".", "_") if underscores else module)
        expected[module] = LoraKeys(*(f"{stem}.{end}" for end in ends))
    keys = [key for halves in expected.values() for key in (halves.A, halves.B, halves.alpha)]
    match = match_lora_keys(keys, MODULES)
    assert (dict(match.loras), match.unmatched) == (expected, ())
    assert match.prefixes == {prefix.format(component="dit")}


def test_a_spelling_that_no_program_writes_is_no_dialect():
    keys = [f"lora_transformer_{MODULES[0].replace('.', '_')}.lora_{half}.weight" for half in ("down", "up")]
    assert match_lora_keys(keys, MODULES).lora_format(DIT) is None


PARTS = LoraNaming(
    "dit",
    {
        "diffusers": TableMap({"img_in": "x_embedder"}, fused={"a.{}.qkv": ("b.{}.q", "b.{}.k")}),
        "kohya": TableMap({"img_in": "img_in", "a.{}.qkv": "c.{}.qkv"}),
        "comfyui": None,
    },
)
PART_MODULES = ("a.6.qkv", "a.7.qkv", "img_in")


@pytest.mark.parametrize(
    ("lora_format", "parts", "stems"),
    [
        ("diffsynth", ["a.7.qkv"], ["a.7.qkv"]),
        ("diffusers", ["b.7.q", "b.7.k"], ["transformer.b.7.q", "transformer.b.7.k"]),
        ("kohya", ["c.7.qkv"], ["lora_unet_c_7_qkv"]),
    ],
)
def test_a_dialect_has_its_own_names_for_a_module_or_for_its_parts(lora_format, parts, stems):
    ends = LORA_FORMATS[lora_format].A, LORA_FORMATS[lora_format].B
    alphas = [f"{stem}.alpha" if lora_format == "kohya" else None for stem in stems]
    expected = tuple(LoraKeys(stem + ends[0], stem + ends[1], alpha) for stem, alpha in zip(stems, alphas, strict=True))
    assert lora_keys("a.7.qkv", lora_format, PARTS) == expected
    keys = [key for part in expected for key in (part.A, part.B, part.alpha) if key]
    match = match_lora_keys(keys, PART_MODULES, PARTS)
    assert matched(match, PARTS) == (lora_format, dict(zip(parts, expected, strict=True)), [])
    assert {whole for part in parts for whole in match.vocabulary.public(part)} == {"a.7.qkv"}


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "lora_unet_"])
def test_any_prefix_stands_before_the_names_of_any_dialect(prefix):
    """ai-toolkit writes diffusers' names after ComfyUI's prefix."""
    keys = [f"{prefix}b.7.k.lora_{half}.weight" for half in "AB"]
    match = match_lora_keys(keys, PART_MODULES, PARTS)
    assert (dict(match.loras), match.unmatched) == ({"b.7.k": LoraKeys(*keys)}, ())
    assert match.vocabulary.parts("a.7.qkv") == ("b.7.q", "b.7.k")


def test_a_part_that_is_not_there_has_no_keys():
    key = "transformer.b.7.k.lora_B.weight"
    assert matched(match_lora_keys([key], ["a.7.qkv"], PARTS), PARTS)[1:] == ({"b.7.k": LoraKeys(B=key)}, [])


def test_a_dialect_without_names_is_not_written():
    assert [name for name in LORA_FORMATS if PARTS.known(name)] == ["diffsynth", "diffusers", "kohya"]
    with pytest.raises(KeyError, match="comfyui"):
        lora_keys("img_in", "comfyui", PARTS)


@pytest.mark.parametrize("component", ["dit", "text_encoder"])
def test_the_prefix_of_a_checkpoint_is_that_of_the_component(component):
    keys = [f"pipe.{component}.img_in.lora_{half}.default.weight" for half in "AB"]
    naming = LoraNaming(component)
    found = match_lora_keys(keys, MODULES, naming)
    assert matched(found, naming) == ("diffsynth", {"img_in": LoraKeys(*keys)}, [])
    assert matched(match_lora_keys(keys, MODULES, LoraNaming("vae")))[1:] == ({}, keys)


def test_underscores_are_resolved_against_the_modules_that_are_there():
    modules = ["blocks.0.to_q", "blocks.0.mlp.fc_1", "blocks_extra.0"]
    keys = [
        "lora_unet_blocks_0_to_q.lora_up.weight",
        "lora_unet_blocks_0_mlp_fc_1.alpha",
        "lora_unet_blocks_extra_0.alpha",
    ]
    assert matched(match_lora_keys(keys, modules))[1:] == (
        {
            "blocks.0.to_q": LoraKeys(B=keys[0]),
            "blocks.0.mlp.fc_1": LoraKeys(alpha=keys[1]),
            "blocks_extra.0": LoraKeys(alpha=keys[2]),
        },
        [],
    )


def test_underscores_that_could_be_two_modules_are_of_none():
    key = "lora_unet_a_b_c.alpha"
    assert match_lora_keys([key], ["a.b_c", "a_b.c"]).unmatched == (key,)


@pytest.mark.parametrize("lora_format", WRITTEN)
@pytest.mark.parametrize(
    "unknown",
    [
        "transformer_blocks.99.attn.to_q.lora_A.default.weight",
        "lora_te_text_model_encoder_layers_0.lora_down.weight",
        "transformer_blocks.0.attn.to_q.weight",
        "pipe.text_encoder.model.norm.weight",
        "transformer_blocks.0.attn.to_q.diff_b",
        "alpha",
        "",
    ],
)
def test_keys_that_fit_no_module_are_told(lora_format, unknown):
    name, found, unmatched = matched(match_lora_keys([*written(lora_format), unknown], MODULES))
    assert name == lora_format
    assert set(found) == set(MODULES)
    assert unmatched == [unknown]


def test_a_missing_half_is_none():
    key = WRITTEN["diffusers"][1]
    assert matched(match_lora_keys([key], MODULES))[1:] == ({MODULES[0]: LoraKeys(B=key)}, [])


def test_two_keys_of_one_half_are_told():
    keys = ["img_in.lora_A.weight", "transformer.img_in.lora_down.weight"]
    match = match_lora_keys(keys, MODULES)
    assert match.loras == {"img_in": LoraKeys(A=keys[0])}
    assert match.unmatched == match.repeated == (keys[1],)


@pytest.mark.parametrize("lora_format", WRITTEN)
def test_nothing_is_found_for_another_model(lora_format):
    keys = written(lora_format)
    assert matched(match_lora_keys(keys, ["blocks.0.self_attn.q"]))[1:] == ({}, keys)


def test_an_empty_file_is_of_the_documented_dialect_and_has_nothing_unmatched():
    assert matched(match_lora_keys([], MODULES)) == ("diffsynth", {}, [])


TENSORS = ("blocks.0.q.weight", "blocks.0.q.bias", "blocks.0.norm.weight", "blocks.0.modulation", "head.modulation")


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "lora_unet_"])
def test_whole_differences_find_weights_biases_and_modulations(prefix):
    ends = {"blocks.0.q": ".diff", "blocks.0.norm": ".diff", "blocks.0": ".diff_m", "head": ".diff_m"}
    spelled = {stem: prefix + (stem.replace(".", "_") if prefix.endswith("_") else stem) for stem in ends}
    keys = [spelled[stem] + end for stem, end in ends.items()] + [spelled["blocks.0.q"] + ".diff_b"]
    match = match_lora_keys(keys, ["blocks.0.q"], tensors=TENSORS)
    assert match.unmatched == ()
    assert match.differences == {
        "blocks.0.q.weight": keys[0], "blocks.0.norm.weight": keys[1], "blocks.0.modulation": keys[2],
        "head.modulation": keys[3], "blocks.0.q.bias": keys[4],
    }  # fmt: skip


def test_the_module_names_of_qwen_image_stay_distinct_with_underscores(tiny_models):
    from diffsynth_core.models.spec import modules_with_weights
    from diffsynth_core.weights.headers import read_headers

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
        ("blocks.0.q.ia3_l", "IA3"),
        ("diffusion_model.blocks.0.q.on_input", "IA3"),
        ("lycoris_blocks_0_q.a1.weight", "GLoRA"),
        ("base_model.model.blocks.0.q.boft_R", "BOFT"),
        ("transformer.blocks.0.q.lora_B.bias", "LoRA with biases"),
        ("base_model.model.blocks.0.q.vera_lambda_b", "VeRA"),
        ("lora_unet_blocks_0_norm.w_norm", "LyCORIS norm"),
        ("diffusion_model.blocks.0.q.set_weight", "ComfyUI weight replacement"),
    ],
)
def test_adapters_that_are_more_than_a_lora_are_refused_by_name(key, title):
    with pytest.raises(DiffSynthError) as raised:
        refuse_other_adapters("mine.safetensors", [*written("kohya"), key])
    assert raised.value.problems[0].message == (f"`mine.safetensors`: {title} adapters are not supported yet: `{key}`")


@pytest.mark.parametrize("lora_format", WRITTEN)
def test_a_plain_lora_is_not_refused_but_for_one_key_more(lora_format):
    refuse_other_adapters("mine.safetensors", written(lora_format))
    with pytest.raises(DiffSynthError):
        refuse_other_adapters("mine.safetensors", [*written(lora_format), "blocks.0.q.lokr_w1"])


FUSED = LoraNaming(
    "dit",
    fused={"kohya": TableMap({"img_in": "x"}, fused={"a.{}.qkv": ("b.{}.q", "b.{}.k")})},
    modules=("b.{}.q", "b.{}.k", "x"),
)


def test_a_dialect_can_have_several_modules_as_one():
    keys = [f"lora_unet_a_7_qkv.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")]
    match = match_lora_keys(keys, FUSED.modules_met(keys), FUSED)
    assert matched(match, FUSED) == ("kohya", {"a.7.qkv": LoraKeys(*keys)}, [])
    assert match.vocabulary.public("a.7.qkv") == ("b.7.q", "b.7.k")
    assert FUSED.known("kohya") and not FUSED.written("kohya") and FUSED.written("comfyui")


def test_the_modules_that_a_file_may_mean_have_the_numbers_of_its_keys():
    assert FUSED.modules_met(["lora_unet_a_7_qkv.alpha", "b.12.q.lora_A.weight"]) == [
        "b.7.q", "b.12.q", "b.7.k", "b.12.k", "x",
    ]  # fmt: skip
    assert FUSED.modules_met(["x.lora_A.weight"]) == ["x"]
