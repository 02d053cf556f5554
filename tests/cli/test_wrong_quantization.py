"""`quant_options`: unknown entries, methods and modules, and components that cannot be quantized."""

import importlib.util
import json

from tests.conftest import ENTRIES
from tests.naming import names

DIT, TEXT_ENCODER = ENTRIES["dit"], ENTRIES["text_encoder"]


def test_all_that_is_wrong_with_it_is_told_together(refuse):
    options = f"{DIT}:nf5/to_x;nothing:int8;{DIT}:fp8;{TEXT_ENCODER}:nf4/q_project;{ENTRIES['vae']}:torchao_int8_w8a16"
    code, problems = refuse("--quant_options", options, "--fp8_models", TEXT_ENCODER)
    assert code == 2
    assert problems == [
        (names("quant_options", "nothing", "not an entry"), names(DIT)),
        (names("quant_options", DIT, "twice"), names("keep one")),
        (names("fp8_models", "quant_options", TEXT_ENCODER), names("remove it")),
        (names("quant_options", "nf5", "fp8, int8, nf4"), names("nf4")),
        (names("quant_options", "torchao_int8_w8a16"), names("int8")),
        (names("quant_options", "q_project", "text_encoder"), names("q_proj")),
    ]


def test_what_names_no_method(refuse):
    assert refuse("--quant_options", DIT) == (2, [(names("quant_options", "no method", DIT), names(":nf4"))])


def test_a_component_whose_weights_train(refuse):
    message = names("trainable_models", "dit", "quant_options", "4-bit NormalFloat", DIT)
    hint = names("quant_options", "--lora_base_model dit")
    assert refuse("--quant_options", f"{DIT}:bitsandbytes_nf4", recipe="qwen-image-full") == (2, [(message, hint)])


def test_a_list_of_shards_is_named_as_in_model_paths(refuse, models):
    """The rejection of full training shows that the component was recognized."""
    shards = [str(path) for path in sorted((models / "Qwen/Qwen-Image/transformer").glob("*.safetensors"))]
    named = ("--model_paths", json.dumps([shards]), "--model_id_with_origin_paths", f"{TEXT_ENCODER},{ENTRIES['vae']}")
    code, [(message, _)] = refuse(*named, "--quant_options", f"{json.dumps(shards)}:int8", recipe="qwen-image-full")
    assert code == 2 and message == names("trainable_models", "dit", "quant_options", "8-bit integers")


def test_a_package_that_is_not_installed(refuse, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    message = names("quant_options", "nf4", "bitsandbytes", "not installed")
    assert refuse("--quant_options", f"{DIT}:nf4") == (1, [(message, names("diffsynth-cli[bitsandbytes]"))])
