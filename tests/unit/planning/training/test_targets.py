"""What a run trains: given names match one or several modules, and LoRA formats without a name are rejected."""

from dataclasses import replace
from pathlib import Path

import pytest

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem, collect_problems
from diffsynth_core.models.qwen_image.spec import QWEN_IMAGE
from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.models.spec import ComponentFacts, ComponentFiles, Layout
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.planning.training.targets import Training, find_training
from diffsynth_core.weights.key_maps import TableMap
from diffsynth_core.weights.lora_formats import LORA_FORMATS
from tests.naming import names

NAMES = TableMap(
    {"double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn.to_out.0"},
    fused={
        "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"),
        "single_blocks.{}.linear1": (
            *((f"single_transformer_blocks.{{}}.attn.to_{part}", 1) for part in "qkv"),
            ("single_transformer_blocks.{}.proj_mlp", 4),
        ),
    },
)
SHAPES = {
    **{f"transformer_blocks.{block}.attn.to_{part}.weight": (4, 4) for block in range(2) for part in "qkv"},
    **{f"transformer_blocks.{block}.attn.to_out.0.weight": (4, 4) for block in range(2)},
    **{f"single_transformer_blocks.0.attn.to_{part}.weight": (4, 4) for part in "qkv"},
    "single_transformer_blocks.0.proj_mlp.weight": (16, 4),
}


DIT = ComponentFacts(
    name="dit",
    title="diffusion transformer",
    layouts=(Layout(frozenset(), public_keys=NAMES),),
    file_patterns=(),
    lora_targets=("qkv", "proj", "linear1"),
    lora_key_maps={"kohya": None, "comfyui": None},
)


def found(dit: ComponentFacts = DIT, shapes: dict[str, tuple[int, ...]] = SHAPES) -> ModelPlan:
    facts = replace(QWEN_IMAGE, title="Invented", components=(dit, *QWEN_IMAGE.components[1:]))
    files = ComponentFiles("dit", "x", (Path("x"),), None, dit.layouts[0])
    return ModelPlan(facts=facts, variant=facts.variant({}, (), ""), components={"dit": files}, shapes={"dit": shapes})


def training(found: ModelPlan, **values: object) -> tuple[Training, list[Problem]]:
    parameters = Parameters.model_validate({"lora_base_model": "dit", **values})
    with collect_problems() as problems:
        result = find_training(parameters, found, frozenset())
    return result, problems


def test_a_typed_module_that_is_several_here_is_one():
    result, problems = training(found())
    assert problems == []
    assert result.lora_modules == (
        "double_blocks.0.img_attn.proj",
        "double_blocks.0.img_attn.qkv",
        "double_blocks.1.img_attn.proj",
        "double_blocks.1.img_attn.qkv",
        "single_blocks.0.linear1",
    )
    assert result.untrainable_targets == ()


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("to_q", names("qkv", "linear1")),
        ("transformer_blocks.0.attn.to_out.0", names("proj")),
        ("proj_mlp", names("linear1")),
        ("img_attn.qk", names("img_attn.qkv")),
        ("xyzzy", names("qkv, proj, linear1")),
    ],
)
def test_a_target_that_addresses_nothing_is_told_with_what_it_is_called(says, target, hint):
    """Parts of a documented module have no names that could be given."""
    result, problems = training(found(), lora_target_modules=target)
    says(problems)
    assert problems == [Problem(names("lora_target_modules", "no module", "dit", target), hint, wrong_use=True)]
    assert result.lora_modules == ()


@pytest.mark.parametrize(
    ("dead", "untrainable_targets"),
    [
        ({"transformer_blocks.1.attn"}, ("double_blocks.1.img_attn.proj", "double_blocks.1.img_attn.qkv")),
        ({"transformer_blocks.1.attn.to_v", "transformer_blocks.1.attn.to_out"}, ("double_blocks.1.img_attn.proj",)),
    ],
)
def test_a_module_none_of_whose_parts_gets_a_gradient_is_left_out(dead, untrainable_targets):
    result, problems = training(found(replace(DIT, unused_params=lambda names: frozenset(dead))))
    assert problems == []
    assert result.untrainable_targets == untrainable_targets
    assert len(result.lora_modules) == 5 - len(untrainable_targets)


def test_a_module_that_the_files_lack_a_part_of_is_none():
    """The incomplete files are reported elsewhere."""
    shapes = {name: shape for name, shape in SHAPES.items() if not name.startswith("transformer_blocks.0.attn.to_k")}
    result, problems = training(found(shapes=shapes))
    assert problems == []
    assert "double_blocks.0.img_attn.qkv" not in result.lora_modules


@pytest.mark.parametrize("name", ["kohya", "comfyui"])
def test_a_format_without_names_for_the_component_is_refused(says, name):
    _, problems = training(found(), lora_format=name)
    says(problems)
    assert problems == [
        Problem(
            names("lora_format", name, "dit of Invented"),
            names("--lora_format diffsynth", "--lora_format diffusers"),
            wrong_use=True,
        )
    ]
    assert training(found(), lora_format="diffusers")[1] == []


def test_a_format_that_would_raise_the_rank_is_left_to_convert_lora(says):
    fused = replace(DIT, lora_key_maps={}, lora_fused={"kohya": TableMap({})})
    problems = training(found(fused), lora_format="kohya")[1]
    says(problems)
    assert problems == [
        Problem(
            names("lora_format", "kohya", "dit of Invented", "rank"),
            names("--lora_format diffsynth", "diffsynth convert-lora --to kohya"),
            wrong_use=True,
        )
    ]


@pytest.mark.parametrize(
    ("family", "formats"),
    [
        ("qwen-image", ["diffsynth", "diffusers", "comfyui", "kohya"]),
        ("wan", ["diffsynth", "diffusers", "comfyui", "kohya"]),
        ("flux", ["diffsynth", "diffusers", "comfyui", "kohya"]),
        ("flux2", ["diffsynth", "diffusers"]),
    ],
)
def test_the_formats_of_a_family(family, formats):
    facts = FAMILIES[family]
    naming = facts.component(facts.denoiser).lora_naming
    assert [name for name in LORA_FORMATS if naming.written(name)] == formats


def test_a_format_of_the_denoiser_is_refused_for_others(says):
    _, problems = training(found(), lora_format="kohya", lora_base_model="vae", lora_target_modules="x")
    says(problems)
    assert problems == [
        Problem(
            names("lora_format", "kohya", "dit", "lora_base_model", "vae"),
            names("--lora_format diffsynth"),
            wrong_use=True,
        )
    ]


# Modules of a component


def trained(text: str, found: ModelPlan) -> tuple[Training, list[Problem]]:
    return training(found, lora_base_model=None, trainable_models=text)


def test_modules_of_a_component_are_named_with_dots():
    result, problems = trained("dit.double_blocks.0.img_attn,dit.single_blocks,dit.double_blocks.0.img_attn", found())
    assert problems == []
    assert (result.full, result.parts) == ((), {"dit": ("double_blocks.0.img_attn", "single_blocks")})
    assert result.components == {"dit"}
    assert result.weights("dit", DIT.layouts[0], SHAPES) == {
        name for name in SHAPES if name.startswith(("transformer_blocks.0.", "single_transformer_blocks."))
    }
    assert result.weights("vae", DIT.layouts[0], SHAPES) == frozenset()


def test_a_single_weight_is_a_module_too():
    result, problems = trained("dit.double_blocks.1.img_attn.proj.weight", found())
    assert problems == []
    assert result.weights("dit", DIT.layouts[0], SHAPES) == {"transformer_blocks.1.attn.to_out.0.weight"}


def test_a_component_named_whole_trains_whole():
    result, problems = trained("dit.single_blocks,dit", found())
    assert problems == []
    assert (result.full, result.parts) == (("dit",), {})
    assert result.weights("dit", DIT.layouts[0], SHAPES) == SHAPES.keys()


@pytest.mark.parametrize(
    ("module", "hint"),
    [
        ("double_blocks.0.img_atn", names("dit.double_blocks.0.img_attn")),
        ("double_blocks.7", names("dit.double_blocks.1")),
        ("transformer_blocks.0.attn", names("dit.double_blocks.0.img_attn")),
        ("transformer_blocks.1.attn.to_k", names("dit.double_blocks.1.img_attn.qkv")),
        ("single_transformer_blocks", names("dit.single_blocks.0.linear1")),
        ("xyzzy", names("double_blocks", "single_blocks")),
        ("double", names("dit.double_blocks")),
        ("transformer_blocks.1.attn.to_out.0.weight", names("dit.double_blocks.1.img_attn.proj.weight")),
    ],
)
def test_a_module_that_is_not_there_is_told_with_what_it_is_called(says, module, hint):
    result, problems = trained(f"dit.{module}", found())
    says(problems)
    message = names("trainable_models", "dit", "no module", module)
    assert problems == [Problem(message, hint, wrong_use=True)]
    assert result.parts == {}


def test_a_module_that_no_gradient_reaches_is_refused():
    dead = replace(DIT, unused_params=lambda names: frozenset({"transformer_blocks.1.attn.to_out"}))
    message = names("trainable_models", "dit.double_blocks.1.img_attn.proj", "no gradient")
    problem = Problem(message, "remove it", wrong_use=True)
    assert trained("dit.double_blocks.1.img_attn.proj", found(dead))[1] == [problem]
    assert trained("dit.double_blocks.1.img_attn", found(dead))[1] == [], "some of it is reached"


def test_a_component_that_the_model_does_without_is_refused():
    message = names("trainable_models", "controlnet", "Qwen-Image", "does not have")
    hint = names("--extra_inputs controlnet_image")
    for text in ("controlnet", "controlnet.transformer_blocks.0"):
        assert trained(text, found())[1] == [Problem(message, hint, wrong_use=True)]
