"""A padded batch of four with captions of different lengths equals the mean of its samples, in loss and gradients."""

import pytest
import torch

from diffsynth_core.config.resolve import resolve
from diffsynth_core.data.batches import SampleRef
from diffsynth_core.planning.data.encodings import with_encodings
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.encode import fill_cache
from diffsynth_core.training.loader import MicroBatch
from diffsynth_core.training.model import build_training_module
from diffsynth_core.training.setup import make_accelerator

TOLERANCE = 1e-5


def train_setup(family, photographs, tiny_models, recipe: str):
    flags = {
        "recipe": recipe,
        "dataset_base_path": str(photographs),
        "dataset_num_workers": "0",
        "batch_size": "4",
        "output_path": "unused",
    }
    plan = make_plan(resolve(flags), SilentReporter(), base=tiny_models)
    plan = with_encodings(plan, SilentReporter())
    accelerator = make_accelerator(plan)
    fill_cache(plan, family, accelerator, SilentReporter(), StopRequest())
    model = build_training_module(plan, family, accelerator.device, SilentReporter())
    # LoRA starts with B = 0, which would hide the gradients of A.
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, plan.encodings


def micro_batch(encodings, samples: list[int]) -> MicroBatch:
    encoded = []
    for sample in samples:
        encoded.append(
            {name: tensor for part in encodings.encoders for name, tensor in part.cache.read(part.key(sample)).items()}
        )
    refs = tuple(SampleRef(sample, repeat=0) for sample in samples)
    return MicroBatch(0, refs, tuple(encoded), tuple({} for _ in samples), counts=True)


def losses_and_gradients(model, batches: list[MicroBatch]):
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = model(batch)
        (loss.sum() / 4).backward()
        losses += loss.tolist()
    return losses, {name: parameter.grad.clone() for name, parameter in model.trained().items()}


@pytest.mark.parametrize("recipe", ["qwen-image-lora", "qwen-image-full"])
def test_a_padded_batch_equals_its_singles(family, photographs, tiny_models, recipe):
    model, encodings = train_setup(family, photographs, tiny_models, recipe)
    lengths = {len(micro_batch(encodings, [sample]).encoded[0]["prompt_embeds"]) for sample in range(4)}
    assert len(lengths) > 1, "the captions must have different lengths for this to say anything"
    together, gradients = losses_and_gradients(model, [micro_batch(encodings, [0, 1, 2, 3])])
    singles, gradients_of_singles = losses_and_gradients(
        model, [micro_batch(encodings, [sample]) for sample in range(4)]
    )
    assert max(abs(one - other) for one, other in zip(together, singles, strict=True)) < TOLERANCE
    worst = max(float((gradients[name] - gradients_of_singles[name]).abs().max()) for name in gradients)
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    print(f"{recipe}: gradients differ by {worst:.1e}, the largest is {scale:.1e}")
    assert worst < TOLERANCE < scale / 100
    # The last block's text half cannot influence the output; every other trained parameter gets a gradient.
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_padding_matters_when_the_mask_is_left_out(family, photographs, tiny_models):
    """Guard of the test above: without the mask, the padded batch computes something else."""
    model, encodings = train_setup(family, photographs, tiny_models, "qwen-image-lora")
    batch = micro_batch(encodings, [0, 1, 2, 3])
    right = model(batch)
    collate = family.collate
    family.collate = lambda encoded: {
        name: tensor for name, tensor in collate(encoded).items() if name != "prompt_mask"
    }
    try:
        assert float((model(batch) - right).detach().abs().max()) > 20 * TOLERANCE
    finally:
        del family.collate
