"""What each type of parameter accepts and rejects, from the command line (strings) and from YAML (values)."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from diffsynth_core.config.parameters import GROUPS, SETTINGS, TYPE_WORDS, Parameters, as_plain


def convert(name, value):
    return getattr(Parameters.model_validate({name: value}), name)


TAKEN = [
    ("lora_rank", "16", 16),
    ("lora_rank", 16, 16),
    ("lora_rank", 16.0, 16),
    ("max_steps", None, None),
    ("max_steps", "5", 5),
    ("seed", 2**63 - 1, 2**63 - 1),
    ("seed", "0", 0),
    ("dataset_repeat", 10**12, 10**12),
    ("learning_rate", "1e-4", 1e-4),
    ("learning_rate", "1E5", 1e5),
    ("learning_rate", ".5", 0.5),
    ("learning_rate", 1, 1.0),
    ("learning_rate", 0, 0.0),
    ("max_grad_norm", None, None),
    ("max_timestep_boundary", "1", 1.0),
    ("find_unused_parameters", True, True),
    ("find_unused_parameters", "false", False),
    ("find_unused_parameters", "True", True),
    ("output_path", "a/b c", Path("a/b c")),
    ("dataset_metadata_path", None, None),
    ("remove_prefix_in_ckpt", "", ""),
    ("lora_base_model", "dit", "dit"),
    ("trainable_models", "dit", ("dit",)),
    ("trainable_models", " dit, vae ,,text_encoder, ", ("dit", "vae", "text_encoder")),
    ("trainable_models", "", ()),
    ("trainable_models", ["dit ", "vae"], ("dit", "vae")),
    ("trainable_models", [], ()),
    ("lora_target_modules", None, None),
    ("lora_target_modules", "", ()),
    ("model_id_with_origin_paths", "a/b:c*.x,d/e:f", ("a/b:c*.x", "d/e:f")),
    ("model_paths", '["a", ["b", "c"]]', (("a",), ("b", "c"))),
    ("model_paths", ["a", ["b", "c"]], (("a",), ("b", "c"))),
    ("model_paths", "[]", ()),
    ("task", "sft:data_process", "sft:data_process"),
    ("resume", "auto", "auto"),
    ("mixed_precision", None, None),
    ("adam_betas", "0.9,0.99", (0.9, 0.99)),
    ("adam_betas", " 0.9 , 0.99 ", (0.9, 0.99)),
    ("adam_betas", [0.9, 0.99], (0.9, 0.99)),
    ("adam_betas", "0,0", (0.0, 0.0)),
    ("quant_options", "", ""),
    ("quant_options", " a/b:c*.x:nf4 ; d:int8/img_mod.1, q ;", "a/b:c*.x:nf4;d:int8/img_mod.1,q"),
    ("quant_options", '["a 1.x", "a:2.x"]:fp8/q', '["a 1.x", "a:2.x"]:fp8/q'),
    ("quant_options", {"a/b:c*.x": "nf4", "d": "int8/q"}, "a/b:c*.x:nf4;d:int8/q"),
    ("optimizer_args", "", ""),
    ("optimizer_args", "  fused=true  betas=0.9,0.99 ", "betas=0.9,0.99 fused=true"),
    (
        "optimizer_args",
        {"fused": True, "betas": [0.9, 0.99], "eps": 1e-8, "beta3": None, "d": 2},
        "beta3=none betas=0.9,0.99 d=2 eps=1e-08 fused=true",
    ),
    ("caption_dropout", "0.1", 0.1),
    ("blocks_to_swap", "auto", "auto"),
    ("blocks_to_swap", "16", 16),
    ("blocks_to_swap", 0, 0),
    ("max_time", " 3h50m ", "3h50m"),
    ("max_time", "1.5h", "1.5h"),
    ("validation_split", 0.05, "0.05"),
    ("validation_split", "held_out/", "held_out/"),
    ("gpu_memory", " 24GB ", "24GB"),
    ("gpu_memory", "79.6 gib", "79.6 gib"),
]

REFUSED = [
    *(("lora_rank", value) for value in ("", "x", "1.5", 1.5, "1e3", "0x10", True, None, [1], 0, -1, "٣")),
    *(("seed", value) for value in (-1, 2**63, True)),
    *(("height", value) for value in (15, "-16", False)),
    *(("learning_rate", value) for value in ("", "x", "1,5", True, None, -1e-9, "nan", "inf", float("inf"), [1])),
    *(("max_grad_norm", value) for value in (0, -1, "nan", False)),
    *(("min_timestep_boundary", value) for value in (-0.1, 1.1)),
    *(("find_unused_parameters", value) for value in ("maybe", 2, None, "")),
    *(("output_path", value) for value in (3, None, True, ["a"])),
    *(("remove_prefix_in_ckpt", value) for value in (3, None, True)),
    *(("lora_base_model", value) for value in (3, True, ["dit"])),
    *(("trainable_models", value) for value in (3, None, True, [1], {"dit": 1}, [["dit"]])),
    *(
        ("model_paths", value)
        for value in ("a", "", None, 3, '"a"', '{"a": 1}', "[3]", [[]], [""], [["a", 3]], [[["a"]]])
    ),
    *(("task", value) for value in ("SFT", "", None, "train")),
    *(("resume", value) for value in ("never", True, "")),
    *(("mixed_precision", value) for value in ("fp32", False)),
    *(
        ("adam_betas", value)
        for value in ("", "0.9", "0.9,", "0.9,0.99,0.999", "a,b", "0.9,1", "-0.1,0.9", "0.9,nan", 0.9)
    ),
    *(("adam_betas", value) for value in (None, [True, 0.9], [0.9], {"a": 0.9, "b": 0.99})),
    *(("caption_dropout", value) for value in (1, 1.5, -0.1, "nan", "often", True, None)),
    *(("optimizer_args", value) for value in ("fused", "fused=", "=1", "a b=1", "a=1 a=2", "1a=1", None, 3, ["a=1"])),
    *(("optimizer_args", value) for value in ({"a": {"b": 1}}, {"a": ""}, {1: 2}, {"a b": 1})),
    *(
        ("quant_options", value)
        for value in ("nf4", "a:", ":nf4", "a:/q", "[]:nf4", "[1]:nf4", "[a:nf4", None, 3, ["a:nf4"])
    ),
    *(("blocks_to_swap", value) for value in ("", "all", -1, "-1", 1.5, True, None, [1], 2**60)),
    *(("max_time", value) for value in ("20", 20, "", "h", "-1h", "0s", "5m3h", "3:50")),
    *(("validation_split", value) for value in ("", True, ["a"], {"a": 1})),
    *(("gpu_memory", value) for value in ("24", 24, "", "GB", "-1GB", "24 TB", "1.GB")),
]


@pytest.mark.parametrize(("name", "value", "expected"), TAKEN)
def test_values_that_are_taken(name, value, expected):
    found = convert(name, value)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_values_that_are_refused(name, value):
    with pytest.raises(ValidationError) as caught:
        convert(name, value)
    assert {detail["loc"][0] for detail in caught.value.errors()} == {name}


def test_every_kind_of_setting_is_tried_here():
    tried = {SETTINGS[name].type_name for name, *_ in TAKEN} & {SETTINGS[name].type_name for name, _ in REFUSED}
    assert tried == {setting.type_name for setting in SETTINGS.values()} == {*TYPE_WORDS, "choice"}


def test_an_unknown_name_is_refused():
    with pytest.raises(ValidationError):
        Parameters.model_validate({"lora_ranks": 4})


def test_parameters_do_not_change():
    with pytest.raises(ValidationError):
        Parameters().lora_rank = 4  # type: ignore[misc]


def test_plain_values_make_the_same_parameters_again():
    given = {
        "model_paths": '["a", ["b", "c"]]',
        "trainable_models": "dit,vae",
        "output_path": "x/y",
        "learning_rate": "1e-5",
    }
    parameters = Parameters.model_validate(given)
    plain = as_plain(parameters)
    assert Parameters.model_validate(plain) == parameters
    assert plain["model_paths"] == ["a", ["b", "c"]]
    assert plain["trainable_models"] == ["dit", "vae"]
    assert plain["output_path"] == "x/y"


def test_every_setting_says_what_it_is():
    for setting in SETTINGS.values():
        assert setting.group in GROUPS
        assert setting.help_text and not setting.help_text.endswith(".")
        assert (setting.type_name == "choice") == bool(setting.choices)
        assert setting.type_words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora_rank", "an integer"),
        ("learning_rate", "a number"),
        ("mixed_precision", "one of no, bf16, fp16"),
        ("resume", "one of auto"),
        ("trainable_models", "a comma-separated list of strings"),
    ],
)
def test_settings_say_what_they_take(name, words):
    assert SETTINGS[name].type_words == words
