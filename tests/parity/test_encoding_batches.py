"""Batches of frozen encoders: captions to the bit as alone; small images and clips as each alone within rounding, and
to the bit the same in any place of any batch.
"""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from diffsynth_core.config.resolve import resolve
from diffsynth_core.errors import Interrupted, collect_problems
from diffsynth_core.models.control import CONTROL_LATENTS
from diffsynth_core.models.registry import FAMILIES, load_family
from diffsynth_core.planning.data.encoder_inputs import load_tokenizers
from diffsynth_core.planning.data.encoding_batches import EncodingBatches, image_batch
from diffsynth_core.planning.data.encodings import with_encodings
from diffsynth_core.planning.model.components import find_components
from diffsynth_core.planning.model.loading import load_planned
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.encode import fill_cache
from diffsynth_core.training.setup import make_accelerator
from tests.conftest import write_metadata
from tests.parity.test_encoder_memory import encoders_of

CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
I2V = {"dit": {"patch_embedding.weight": (1, 36), "proj_out.weight": (64, 1)}}
TI2V = "Wan-AI/Wan2.2-TI2V-5B"
VIDEO, FLUX, VISION = 1e-6, 4e-6, 4e-6
"""Largest difference of rounding between a sample in a batch and alone, relative to the largest value, at least 1."""
IMAGE_ENCODERS = {
    "qwen-image latents": ("qwen-image", {}, (), "", (1, 64, 96), VIDEO),
    "qwen-image edit_latents": ("qwen-image", {}, ("edit_image",), "Qwen/Qwen-Image-Edit-2509", (1, 64, 96), VIDEO),
    "qwen-image controlnet_latents": ("qwen-image", {}, ("controlnet_image",), "", (1, 64, 96), VIDEO),
    "flux latents": ("flux", {}, (), "", (1, 64, 64), FLUX),
    "flux kontext_latents": ("flux", {}, ("kontext_images",), "", (1, 64, 96), FLUX),
    "flux controlnet_latents": ("flux", {}, ("controlnet_image",), "", (1, 64, 64), FLUX),
    "flux2 latents": ("flux2", {}, (), "", (1, 64, 96), FLUX),
    "flux2 edit_image": ("flux2", {}, ("edit_image",), "", (1, 64, 96), FLUX),
    "wan latents": ("wan", {}, (), "", (5, 32, 48), VIDEO),
    "wan latents_with_condition": ("wan", I2V, ("input_image", "end_image"), "", (5, 64, 64), VIDEO),
    "wan image": ("wan", {"image_encoder": {}}, ("input_image", "end_image"), "", (5, 64, 64), VISION),
    "wan ti2v latents": ("wan", {}, (), TI2V, (5, 64, 64), VIDEO),
    "wan ti2v latents_with_first_given": ("wan", {}, ("input_image",), TI2V, (5, 64, 64), VIDEO),
}
"""(family, shapes, extra inputs, origin, shape of the target, difference) of each encoder of images or clips."""


@pytest.fixture(params=IMAGE_ENCODERS)
def image_encoder(request):
    """A family, an encoder with a small module of random weights, as many samples as it encodes together, and the
    largest difference."""
    key, shapes, inputs, origin, size, difference = IMAGE_ENCODERS[request.param]
    name, family = request.param.rpartition(" ")[2], load_family(key)
    encoders = FAMILIES[key].variant(shapes, inputs, origin).encoders
    (encoder,) = (encoder for encoder in encoders if encoder.name == name)
    if encoder.component == "vae":
        *_, config = encoders_of("wan ti2v" if origin == TI2V else key)
    else:
        config = CLIP
    torch.manual_seed(0)
    module = family.build(encoder.component, config).eval()

    def sample():
        target = torch.rand(3, *size) * 2 - 1
        references = [torch.rand(3, 1, *size[1:]) * 2 - 1, torch.rand(3, 1, 32, 32) * 2 - 1]
        shown = references[:1] if name == CONTROL_LATENTS else references
        return {one: target if one in ("image", "video") else shown for one in encoder.columns}

    samples = [sample() for _ in range(image_batch(sample()).size)]
    assert len(samples) > 1

    def encode(some):
        with torch.no_grad():
            return family.encode_batch(encoder, {encoder.component: module}, some)

    return encode, samples, difference


def test_a_batch_of_images_equals_each_alone(image_encoder):
    """Of FLUX, a batch takes other kernels of convolutions; neither is nearer to float64."""
    encode, samples, difference = image_encoder
    together, size = encode(samples), len(samples)
    for index in (0, size - 1):
        (alone,) = encode([samples[index]])
        assert alone.keys() == together[index].keys()
        for name, tensor in alone.items():
            assert tensor.shape == together[index][name].shape
            assert (tensor - together[index][name]).abs().max() <= difference * tensor.abs().max().clamp(min=1)
    assert all(map(same, together[1:], encode(samples[1:] + samples[:1])[:-1]))
    among_copies = encode(samples[:1] + samples[1:2] * (size - 1))
    assert same(among_copies[0], together[0]) and same(among_copies[-1], together[1])


def same(one, other):
    """Return whether encodings are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


CAPTIONS = [
    *(f"a red circle left of a square, number {number}" for number in range(10, 30)),
    *("", "漢字 &amp; ☂", "longer than any encoder reads, " * 300, "cut as well: " * 600),
]
SLOW = pytest.param("flux.2-klein-4b-lora", marks=pytest.mark.long)
RECIPES_WITH_TEXT = ("qwen-image-lora", "flux.1-dev-lora", SLOW, "wan2.1-t2v-1.3b-lora")


@pytest.mark.parametrize("recipe", RECIPES_WITH_TEXT)
def test_a_batch_of_captions_equals_each_alone_to_the_bit(recipe, recipe_models):
    base, resolved = recipe_models(recipe), resolve({"recipe": recipe})
    with collect_problems():
        model = find_components(resolved.parameters, resolved.family, base)
    family, column = load_family(model.facts.name), model.facts.text_column
    encoders = [encoder for encoder in model.variant.encoders if column in encoder.columns]
    assert encoders
    for encoder in encoders:
        components = load_tokenizers(model, family, encoder.component)
        components[encoder.component] = load_planned(
            model, family, encoder.component, torch.float32, torch.device("cpu"), SilentReporter()
        )
        with torch.no_grad(), counted(family, encoder) as sizes:
            batches = EncodingBatches.of(family, encoder, components)
            together = [
                one
                for text in CAPTIONS
                for one in batches.add(text, family.tokenize(encoder, components, {column: text}))
            ]
            together += batches.rest()
            assert max(sizes) > 1 and len(sizes) < len(CAPTIONS)
            assert sorted(text for text, _ in together) == sorted(CAPTIONS)
            for text, encoded in together:
                alone = family.encode(encoder, components, {column: text})
                assert alone.keys() == encoded.keys()
                assert all(torch.equal(alone[name], encoded[name]) for name in alone), (encoder.name, text)


@contextmanager
def counted(family, encoder):
    """Collect the sizes of the batches of an encoder."""
    sizes, known = [], family.encoders[encoder.name]

    def encode(facts, components, values):
        sizes.append(len(values))
        return known.encode(facts, components, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "encoders", {**family.encoders, encoder.name: replace(known, encode=encode)})
        yield sizes


@pytest.fixture
def planned(tiny_models, tmp_path):
    """Plan a LoRA on 20 images of one small size and one of another, with a cache of this name."""
    dataset = tmp_path / "images"
    dataset.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (21, 64, 64, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image[: 32 if number == 20 else 64]).save(dataset / f"{number:02}.png")
    write_metadata(dataset, [(f"{number:02}.png", f"image {number % 5}") for number in range(21)])

    def plan(cache: str, workers: int = 0):
        flags = {"recipe": "qwen-image-lora", "dataset_base_path": str(dataset), "device": "cpu", "lora_rank": 2,
                 "dataset_num_workers": workers, "output_path": str(tmp_path / "out"),
                 "cache_path": str(tmp_path / cache)}  # fmt: skip
        made = make_plan(resolve(flags), SilentReporter(), base=tiny_models)
        return with_encodings(made, SilentReporter())

    return plan


def fill(plan, stop: StopRequest | None = None) -> dict[str, bytes]:
    """Fill the cache; return its entries."""
    family = load_family(plan.model.facts.name)
    fill_cache(plan, family, make_accelerator(plan), SilentReporter(), StopRequest() if stop is None else stop)
    folder = plan.output.cache / "encodings"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_each_caption_is_tokenized_once(planned, monkeypatch):
    tokenized, call = [], PreTrainedTokenizerBase.__call__

    def count(tokenizer, texts, **options):
        tokenized.extend(texts)
        return call(tokenizer, texts, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", count)
    fill(planned("cache"))
    assert len(tokenized) == len(set(tokenized)) == 5


def test_a_cache_filled_in_two_goes_holds_the_same_bytes(planned):
    once = fill(planned("once"))
    assert len(once) == 21 + 5
    first = planned("twice", workers=2)
    some = [replace(part, missing=part.missing[1::3]) for part in first.encodings.encoders]
    begun = fill(replace(first, found_encodings=replace(first.encodings, encoders=tuple(some))))
    assert 0 < len(begun) < len(once) and begun.items() <= once.items()
    again = planned("twice")
    assert {part.encoder.name: len(part.missing) for part in again.encodings.encoders} == {"text": 3, "latents": 14}
    assert fill(again) == once


class StopAtCheck(StopRequest):
    """A stop that is requested before one of the checks for it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def raise_if_set(self) -> None:
        self.left -= 1
        self.signal_number = 2 if self.left <= 0 else None
        super().raise_if_set()


@pytest.mark.parametrize(("check", "kept"), [(1 + 3, 0), (1 + 5 + 2, 2)], ids=["before a sample", "in the last batch"])
def test_a_stop_does_not_wait_for_what_is_not_encoded_yet(planned, check, kept):
    """Five captions share a batch, which is encoded after the last of them."""
    plan = planned("stopped")
    with pytest.raises(Interrupted):
        fill(plan, StopAtCheck(check))
    entries = list((plan.output.cache / "encodings").rglob("*.safetensors"))
    assert len(entries) == kept
    assert len(fill(planned("stopped"))) == 21 + 5
