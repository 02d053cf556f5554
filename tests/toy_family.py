"""A family of its own, registered from outside: clips in eighths of pixels, captions as bytes, two conditions.

Its transformer reads noisy latents, the latents of a control video and a mask, side by side. A test registers it with
`monkeypatch.setitem(FAMILIES, "toy", TOY)`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from diffsynth_core.config.choices import TRAINING_TIMESTEPS
from diffsynth_core.data.conditions import Condition, TargetSpec, ValueCondition
from diffsynth_core.models.configs import read_config
from diffsynth_core.models.family import Encoded, Encoder, Family
from diffsynth_core.models.patches import blank_latents, stack_samples
from diffsynth_core.models.schedulers import unipc
from diffsynth_core.models.size_facts import EmbeddingSpec, LatentFacts, StepSizes
from diffsynth_core.models.spec import (
    ComponentFacts,
    EncoderFacts,
    FamilyFacts,
    Layout,
    SamplingFacts,
    ShapeConstraint,
    Shapes,
    Variant,
)
from diffsynth_core.models.tiny import GAINS, diffusers_config, fill, write_json, write_weights

MODEL_ID = "toys/Toy"
PLACES = {name: f"{name}/model.safetensors" for name in ("transformer", "text_encoder", "vae")}
ENTRIES = [f"{MODEL_ID}:{place}" for place in PLACES.values()]
CHANNELS, FACTOR, TEXT_STATES, TEXT_WIDTH = 4, 8, 16, 8

# Facts

OF_VAE = LatentFacts(CHANNELS, FACTOR)
TEXT = EncoderFacts(
    "text", "text_encoder", ("prompt",), states=EmbeddingSpec(TEXT_STATES, TEXT_WIDTH, ("text_in.weight", 1))
)
LATENTS = EncoderFacts("latents", "vae", ("video",), latents=OF_VAE)
CONTROL = Condition("control_video", "control_video", "target", "video", max_count=1)
MASK = Condition("control_mask", "control_mask", "target", "mask", max_count=1)
OF_CONDITIONS = {
    "control_video": (CONTROL, EncoderFacts("control", "vae", ("control_video",), latents=OF_VAE)),
    "control_mask": (MASK, EncoderFacts("mask", "vae", ("control_mask",), latents=LatentFacts(1, FACTOR))),
}
VALUES = (ValueCondition("speed", "number"), ValueCondition("direction", "text"))


def variant(shapes: Mapping[str, Shapes], inputs: tuple[str, ...], origin: str) -> Variant:
    chosen = [OF_CONDITIONS[name] for name in OF_CONDITIONS if name in inputs]
    values = [value for value in VALUES if value.column in inputs]
    moved = EncoderFacts("motion", "text_encoder", tuple(value.column for value in values))
    return Variant(
        title="Toy",
        model_id=MODEL_ID,
        components=("dit", "text_encoder", "vae"),
        encoders=(TEXT, LATENTS, *(encoder for _, encoder in chosen), *((moved,) if values else ())),
        target=TargetSpec("video", "video", size_factor=FACTOR, usual_pixels=32 * 32),
        sampling=SamplingFacts(steps=4, cfg_scale=2.0, height=32, width=32, num_frames=5, fps=8),
        conditions=tuple(condition for condition, _ in chosen),
        values=tuple(values),
        accepted_inputs=(*OF_CONDITIONS, "speed", "direction"),
    )


def _component(name: str, folder: str, signature: str, **more: Any) -> ComponentFacts:
    return ComponentFacts(name, name, (Layout(frozenset({signature})),), (f"{folder}/*",), **more)


TOY = FamilyFacts(
    name="toy",
    implementation="tests.toy_family:Toy",
    title="Toy",
    model_ids=("toys/*",),
    components=(
        _component(
            "dit",
            "transformer",
            "toy_in.weight",
            lora_targets=("up", "down"),
            modules=("blocks.{}.up", "blocks.{}.down"),
            blocks={"blocks": "num_layers"},
        ),
        _component("text_encoder", "text_encoder", "letters.weight"),
        _component("vae", "vae", "shrink.weight", unused_params=lambda names: frozenset({"grow"})),
    ),
    denoiser="dit",
    variant=variant,
    text_column="prompt",
    tokenizers={},
    published=(),
    conditions=(CONTROL, MASK),
    shape_constraints=(ShapeConstraint("vae", ("shrink.weight", 0), ("toy_out.weight", 0), "latents"),),
)

# Modules


class ToyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.down(torch.tanh(self.up(states)))


class ToyTransformer(ModelMixin, ConfigMixin):
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, width: int = 16, num_layers: int = 4) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.toy_in, self.toy_out = nn.Linear(2 * CHANNELS + 1, width), nn.Linear(width, CHANNELS)
        self.text_in, self.time_in = nn.Linear(TEXT_WIDTH, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(num_layers))

    def forward(self, latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """`[B, 9, F, h, w]` -> `[B, 4, F, h, w]`."""
        states = self.toy_in(latents.to(self.dtype).movedim(1, -1))
        means = self.text_in(text.to(self.dtype).mean(1)) + self.time_in(sigma[:, None].to(self.dtype))
        states = states + means[:, None, None, None]
        for block in self.blocks:
            recompute = torch.is_grad_enabled() and self.gradient_checkpointing
            states = self._gradient_checkpointing_func(block, states) if recompute else block(states)
        return self.toy_out(states).movedim(-1, 1)


class ToyTextEncoder(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(256, TEXT_WIDTH)


class ToyVae(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        kernel = (1, FACTOR, FACTOR)
        self.shrink = nn.Conv3d(3, CHANNELS, kernel, kernel)
        self.grow = nn.ConvTranspose3d(CHANNELS, 3, kernel, kernel)


MODULES = {"dit": ToyTransformer, "text_encoder": ToyTextEncoder, "vae": ToyVae}

# Encoders: (facts, components, the values of their columns)


def encode_text(encoder: EncoderFacts, components: Mapping[str, Any], caption: str) -> Encoded:
    module = components[encoder.component]
    letters = torch.tensor(list(caption.encode()[:TEXT_STATES].ljust(TEXT_STATES)), device=module.device)
    return {"prompt_embeds": module.letters(letters)}


def encode_latents(encoder: EncoderFacts, components: Mapping[str, Any], pixels: Tensor) -> Encoded:
    module = components[encoder.component]
    return {"latents": module.shrink(pixels[None].to(module.dtype))[0].float()}


def encode_control(encoder: EncoderFacts, components: Mapping[str, Any], clips: Sequence[Tensor]) -> Encoded:
    return {"control": encode_latents(encoder, components, clips[0])["latents"]}


def encode_mask(encoder: EncoderFacts, components: Mapping[str, Any], masks: Sequence[Tensor]) -> Encoded:
    """White selects: -1..1 -> 0..1, `[1, 1, h, w]`, the same for every frame."""
    return {"mask": avg_pool2d(masks[0].float() / 2 + 0.5, FACTOR)}


def encode_motion(encoder: EncoderFacts, components: Mapping[str, Any], speed: float, direction: str) -> Encoded:
    return {"motion": encode_text(encoder, components, direction)["prompt_embeds"] * speed}


class Toy(Family):
    facts = TOY
    encoders: ClassVar = {
        "text": Encoder(encode_text),
        "latents": Encoder(encode_latents),
        "control": Encoder(encode_control),
        "mask": Encoder(encode_mask),
        "motion": Encoder(encode_motion),
    }

    def config_of(self, files, shapes):
        return read_config(files.config_path, shapes) if files.config_path else {}

    def build(self, component, config):
        return MODULES[component].from_config({name: config[name] for name in config if name[0] != "_"})

    def load_tokenizer(self, parameter, folder):
        raise AssertionError("it has none")

    def blank_encoding(self, variant: Variant, denoiser: Any, sizes: StepSizes) -> Encoded:
        latents = blank_latents(CHANNELS, FACTOR, sizes.images[0])
        given = {"control": latents, "mask": blank_latents(1, FACTOR, (1, *sizes.images[0][1:]))}
        used = {encoder.name for encoder in variant.encoders}
        text = torch.empty(TEXT_STATES, TEXT_WIDTH)
        given["motion"] = text
        return {"latents": latents, "prompt_embeds": text, **{name: given[name] for name in given if name in used}}

    def collate(self, encoded: Sequence[Encoded]) -> Encoded:
        return stack_samples(encoded)

    def sigmas(self, steps: int = TRAINING_TIMESTEPS) -> Tensor:
        return torch.linspace(1, 0, steps + 1)[:-1]

    def predict_velocity(self, components, noisy: Tensor, sigma: Tensor, batch: Encoded) -> Tensor:
        control = batch.get("control", torch.zeros_like(noisy))
        mask = batch.get("mask", torch.zeros_like(noisy[:, :1])).expand_as(noisy[:, :1])
        text = batch["prompt_embeds"] + batch.get("motion", 0)
        return components["dit"](torch.cat([noisy, control, mask], dim=1), sigma, text)

    def scheduler(self, variant: Variant, steps: int, shape: Sequence[int]) -> Any:
        return unipc(steps, 1.0)

    def decode(self, components, latents: Tensor) -> Tensor:
        return components["vae"].grow(latents).clamp(-1, 1)

    def write_tiny_weights(self, base: Path, component: str, model_id: str, pattern: str) -> None:
        path = PurePosixPath(pattern)
        folder = base / model_id / path.parent
        folder.mkdir(parents=True, exist_ok=True)
        module = MODULES[component]()
        fill(module, GAINS[component], seed=0)
        write_json(folder / "config.json", diffusers_config(module))
        write_weights(folder, path.name, {name: tensor.detach() for name, tensor in module.state_dict().items()})
