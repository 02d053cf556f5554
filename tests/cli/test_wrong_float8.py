"""`fp8_models`: unknown entries, and components for which 8-bit storage is not possible."""

import json

import pytest

DIT = "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors"


@pytest.mark.parametrize("parameter", ["fp8_models", "offload_models"])
def test_an_entry_that_is_none(refuse, parameter):
    entry = "Qwen/Qwen-Image:transformer/diffusion_pytorch_model.safetensors"
    message = f"`{parameter}` names `{entry}`, which is not an entry of the model parameters"
    assert refuse(f"--{parameter}", entry) == (2, [(message, f"did you mean `{DIT}`?")])


def test_an_entry_unlike_any(refuse):
    message = "`fp8_models` names `dit`, which is not an entry of the model parameters"
    text_encoder, vae = "text_encoder/model*.safetensors", "vae/diffusion_pytorch_model.safetensors"
    hint = f"the entries are `{DIT}`, `Qwen/Qwen-Image:{text_encoder}`, `Qwen/Qwen-Image:{vae}`"
    assert refuse("--fp8_models", "dit") == (2, [(message, hint)])


def test_a_component_whose_weights_train(refuse):
    message = f"`trainable_models` names `dit`, whose files `fp8_models` keeps in 8-bit floats: `{DIT}`"
    hint = "remove them from `fp8_models`, or train a LoRA: `--lora_base_model dit`"
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
        assert code == 2 and message.startswith("`trainable_models` names `dit`, whose files `fp8_models` keeps")
