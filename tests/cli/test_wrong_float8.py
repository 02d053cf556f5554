"""`fp8_models`: unknown entries, and components for which 8-bit storage is not possible."""

import json

import pytest

from tests.naming import names

DIT = "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors"


@pytest.mark.parametrize("parameter", ["fp8_models", "offload_models"])
def test_an_entry_that_is_none(refuse, parameter):
    entry = "Qwen/Qwen-Image:transformer/diffusion_pytorch_model.safetensors"
    message = names(parameter, entry, "not an entry")
    assert refuse(f"--{parameter}", entry) == (2, [(message, names(DIT))])


def test_an_entry_unlike_any(refuse):
    message = names("fp8_models", "dit", "not an entry")
    text_encoder, vae = "text_encoder/model*.safetensors", "vae/diffusion_pytorch_model.safetensors"
    hint = names(DIT, f"Qwen/Qwen-Image:{text_encoder}", f"Qwen/Qwen-Image:{vae}")
    assert refuse("--fp8_models", "dit") == (2, [(message, hint)])


def test_a_component_whose_weights_train(refuse):
    message = names("trainable_models", "dit", "fp8_models", DIT)
    hint = names("fp8_models", "--lora_base_model dit")
    assert refuse("--fp8_models", DIT, recipe="qwen-image-full") == (2, [(message, hint)])


def test_all_that_is_wrong_is_told_together(refuse):
    code, problems = refuse("--fp8_models", f"{DIT},nothing", recipe="qwen-image-full")
    assert code == 2
    assert [message.partition("`")[2].partition("`")[0] for message, _ in problems] == [
        "fp8_models",
        "trainable_models",
    ]


def test_a_list_of_shards_is_named_by_any_of_them(refuse, models):
    """The rejection of full training shows that the component was recognized as stored in 8 bits."""
    shards = [str(path) for path in sorted((models / "Qwen/Qwen-Image/transformer").glob("*.safetensors"))]
    rest = [
        "Qwen/Qwen-Image:text_encoder/model*.safetensors",
        "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors",
    ]
    named = ("--model_paths", json.dumps([shards]), "--model_id_with_origin_paths", ",".join(rest))
    for chosen in (shards[:1], shards[1:], shards):
        code, [(message, _)] = refuse(*named, "--fp8_models", ",".join(chosen), recipe="qwen-image-full")
        assert code == 2 and message == names("trainable_models", "dit", "fp8_models")
