"""Qwen-Image's tiny components: templates with the real number of tokens, the processor, published transformers."""

import pytest

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import DiffSynthError, collect_problems
from diffsynth_core.json_files import read_json
from diffsynth_core.models.qwen_image.captions import EDIT_PLUS_TEXT, EDIT_TEXT
from diffsynth_core.models.qwen_image.components import build, load_processor, load_tokenizer
from diffsynth_core.models.qwen_image.encode import (
    DROPPED_EDIT_TOKENS,
    DROPPED_TOKENS,
    EDIT_TEMPLATE,
    PROMPT_TEMPLATE,
    announce_images,
)
from diffsynth_core.models.qwen_image.spec import QWEN_IMAGE
from diffsynth_core.models.qwen_image.tiny import write_tiny_weights
from diffsynth_core.planning.model.tokenizers import find_tokenizers

SHARDS = "transformer/diffusion_pytorch_model*.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    write_tiny_weights(base, "text_encoder", "Qwen/Qwen-Image", "text_encoder/model*.safetensors")
    return base


@pytest.mark.parametrize(
    ("template", "dropped"), [(PROMPT_TEMPLATE, DROPPED_TOKENS), (EDIT_TEMPLATE, DROPPED_EDIT_TOKENS)]
)
def test_system_messages_have_the_tokens_that_are_dropped(written, template, dropped):
    tokenizer = load_tokenizer(written / "Qwen/Qwen-Image/tokenizer")
    before, _ = template.split("{}")
    assert before.endswith("<|im_start|>user\n")
    assert len(tokenizer(before)["input_ids"]) == dropped


def test_images_are_announced_with_a_token_for_each_of_their_patches(written):
    assert announce_images([2], EDIT_TEXT.announced) == "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    assert announce_images([1, 2], EDIT_PLUS_TEXT.announced) == (
        "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"
        "Picture 2: <|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    )
    tokenizer = load_tokenizer(written / "Qwen/Qwen-Image/tokenizer")
    token = read_json(written / "Qwen/Qwen-Image/text_encoder/config.json", dict, "")["image_token_id"]
    assert tokenizer(announce_images([3, 4], EDIT_PLUS_TEXT.announced))["input_ids"].count(token) == 7


def test_the_text_encoder_brings_the_processor_to_where_it_is_looked_for(written):
    processor = load_processor(written / "Qwen/Qwen-Image-Edit/processor")
    assert (processor.patch_size, processor.merge_size, processor.temporal_patch_size) == (14, 2, 2)
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (56 * 56, 28 * 28 * 16384)


@pytest.mark.parametrize("given", ["Qwen/Qwen-Image-Edit:processor", "{base}/Qwen/Qwen-Image-Edit/processor"])
@pytest.mark.parametrize("inputs", [(), ("edit_image",)])
def test_a_processor_is_named_as_a_path_or_below_the_models_and_read_only_with_images_to_edit(written, given, inputs):
    parameters = Parameters(processor_path=given.format(base=written), extra_inputs=inputs)
    with collect_problems() as problems:
        found = find_tokenizers(parameters, QWEN_IMAGE, {}, {}, written)
    assert problems == []
    assert found == ({"processor_path": written / "Qwen/Qwen-Image-Edit/processor"} if inputs else {})


def test_a_folder_without_a_processor_is_told(tmp_path):
    with pytest.raises(DiffSynthError) as caught:
        load_processor(tmp_path)
    (problem,) = caught.value.problems
    assert problem.message.startswith(f"cannot read the processor in `{tmp_path}`: ")
    assert problem.hint == "download the folder again, or pass another with `--processor_path`"


@pytest.mark.parametrize(
    ("model_id", "zero"),
    [
        ("Qwen/Qwen-Image", False),
        ("Qwen/Qwen-Image-Edit", False),
        ("Qwen/Qwen-Image-Edit-2509", False),
        ("Qwen/Qwen-Image-Edit-2511", True),
        ("local/Qwen-Image-Edit-2511", True),
    ],
)
def test_only_the_transformer_of_2511_tells_reference_tokens_of_timestep_0(tmp_path, model_id, zero):
    write_tiny_weights(tmp_path, "dit", model_id, SHARDS)
    config = read_json(tmp_path / model_id / "transformer" / "config.json", dict, "")
    assert config["zero_cond_t"] is zero
    assert build("dit", config).zero_cond_t is zero
