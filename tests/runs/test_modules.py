"""Several modules in one run: only what is requested changes, and the file contains exactly that."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffsynth_core.data.media import MediaCrop
from diffsynth_core.models.flux.family import Flux
from diffsynth_core.models.registry import FAMILIES, load_family
from diffsynth_core.planning.data.encoder_inputs import load_pixel_tensor
from diffsynth_core.training.objective import draw_noise
from tests.clips import detailed, write_clip
from tests.gradients import unused_parameters
from tests.wan import I2V, T2V
from tests.wan import entries as entries_of_wan

QWEN, FLUX, KLEIN = "Qwen/Qwen-Image", "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.2-klein-base-4B"
PLACES = {
    "qwen-image": {
        "dit": f"{QWEN}:transformer/diffusion_pytorch_model*.safetensors",
        "text_encoder": f"{QWEN}:text_encoder/model*.safetensors",
        "vae": f"{QWEN}:vae/diffusion_pytorch_model.safetensors",
        "controlnet": "InstantX/Qwen-Image-ControlNet-Union:diffusion_pytorch_model.safetensors",
    },
    "flux": {
        "dit": f"{FLUX}:flux1-dev.safetensors",
        "text_encoder_1": f"{FLUX}:text_encoder/model.safetensors",
        "text_encoder_2": f"{FLUX}:text_encoder_2/*.safetensors",
        "vae": f"{FLUX}:ae.safetensors",
        "controlnet": "jasperai/Flux.1-dev-Controlnet-Upscaler:diffusion_pytorch_model.safetensors",
    },
    "flux2": {
        "dit": f"{KLEIN}:transformer/*.safetensors",
        "text_encoder": f"{KLEIN}:text_encoder/*.safetensors",
        "vae": f"{KLEIN}:vae/diffusion_pytorch_model.safetensors",
    },
}
TEXT_ENCODERS = {"qwen-image": ("text_encoder",), "flux": ("text_encoder_1", "text_encoder_2")}
TARGETS = {"qwen-image": "to_q,to_k,to_v", "flux": "a_to_qkv,b_to_qkv"}
CONTROLLED = ("--extra_inputs", "controlnet_image", "--data_file_keys", "image,controlnet_image")


@pytest.fixture(scope="module")
def many_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of the image families, with ControlNets."""
    base = tmp_path_factory.mktemp("modules")
    for family, places in PLACES.items():
        for component, entry in places.items():
            load_family(family).write_tiny_weights(base, component, *entry.split(":"))
    return base


@pytest.fixture
def pairs(dataset: Path) -> Path:
    """Photographs with control images: themselves, upside down."""
    from PIL import Image, ImageOps

    rows = ["image,controlnet_image,prompt"]
    for path in sorted(dataset.glob("*.png")):
        ImageOps.flip(Image.open(path)).save(dataset / f"{path.stem}_control.png")
        rows.append(f"{path.name},{path.stem}_control.png,an image of {path.stem}")
    (dataset / "metadata.csv").write_text("\n".join(rows) + "\n")
    return dataset


@dataclass
class Watch:
    """The model of the last run, and its parameters before the first step."""

    models: list[Any] = field(default_factory=list)
    before: dict[str, Tensor] = field(default_factory=dict)

    @property
    def changed(self) -> set[str]:
        after = dict(self.models[-1].components.named_parameters())
        assert after.keys() == self.before.keys()
        return {name for name, tensor in after.items() if not torch.equal(tensor, self.before[name])}

    @property
    def trained(self) -> set[str]:
        return set(self.models[-1].trained())

    @property
    def without_gradient(self) -> set[str]:
        """Return trained parameters for which the optimizer only ever saw zero gradients."""
        state = self.state
        return {name for name in self.trained if not state[f"{name}/exp_avg"].any()}

    @property
    def state(self) -> dict[str, Tensor]:
        (folder,) = Path("out/state").glob("step-*")
        return load_file(folder / "optimizer.safetensors")


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    from diffsynth_core.training import setup

    seen, real = Watch(), setup.build_training_module

    def watched(*arguments: Any) -> Any:
        model = real(*arguments)
        seen.models.append(model)
        seen.before = {name: tensor.detach().clone() for name, tensor in model.components.named_parameters()}
        return model

    monkeypatch.setattr(setup, "build_training_module", watched)
    return seen


@pytest.fixture
def train(cli, pairs, many_models, monkeypatch) -> Callable[..., Any]:
    """Run `diffsynth train` on the images for one step, or more if requested."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(many_models))

    def run(family: str, *arguments: object, steps: int = 1, output: str = "out", controlled: bool = True) -> Any:
        places = {name: entry for name, entry in PLACES[family].items() if controlled or name != "controlnet"}
        outcome = cli(
            "train", "--model_id_with_origin_paths", ",".join(places.values()), "--dataset_base_path", pairs,
            "--dataset_num_workers", 0, "--max_steps", steps, "--output_path", output, "--learning_rate", 1e-3,
            *(CONTROLLED if controlled else ()), *arguments,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        return outcome

    return run


def everything(family: str) -> tuple[str, ...]:
    """The command: text encoders and ControlNet in full, with a LoRA on the transformer."""
    return (
        "--trainable_models", ",".join((*TEXT_ENCODERS[family], "controlnet")), "--lora_base_model", "dit",
        "--lora_target_modules", TARGETS[family], "--lora_rank", "32", "--remove_prefix_in_ckpt", "pipe.dit.",
    )  # fmt: skip


def stored_names(base: Path, family: str, component: str) -> set[str]:
    """Return the keys of a component in its files."""
    model_id, place = PLACES[family][component].split(":")
    return {name for path in (base / model_id).glob(place) for name in load_file(path)}


LORA_MODULES = {
    "qwen-image": {f"transformer_blocks.{n}.attn.to_{part}" for n in range(2) for part in "qkv"},
    "flux": {f"blocks.{n}.attn.{part}_to_qkv" for n in range(2) for part in "ab"},
}


@pytest.mark.parametrize("family", LORA_MODULES)
def test_one_step_changes_exactly_what_was_asked_for(train, watch, family):
    """Of all parameters in memory: text encoders and ControlNet without unused parameters, and the LoRA."""
    train(family, *everything(family))
    model = watch.models[-1]
    assert set(model.components) == {"dit", "controlnet", *TEXT_ENCODERS[family]}, "the vae is not held"
    expected = set()
    variant = FAMILIES[family].variant(
        {"dit": {name: tuple(tensor.shape) for name, tensor in model.components["dit"].state_dict().items()}},
        ("controlnet_image",),
        "",
    )
    for component in (*TEXT_ENCODERS[family], "controlnet"):
        module = model.components[component]
        dead = unused_parameters(FAMILIES[family], component, module, variant)
        expected |= {f"{component}.{name}" for name, _ in module.named_parameters() if name not in dead}
    lora = {name for name in watch.before if ".lora_" in name}
    assert all(name.startswith("dit.") for name in lora)
    assert watch.trained == expected | lora
    assert watch.changed == expected | lora
    assert watch.without_gradient == {name for name in lora if ".lora_A." in name}, "lora_B is zero in the first step"


@pytest.mark.parametrize("family", LORA_MODULES)
def test_the_file_holds_exactly_their_keys(train, many_models, family):
    train(family, *everything(family))
    saved = load_file("out/epoch-0.safetensors")
    lora = {f"{name}.lora_{half}.default.weight" for name in LORA_MODULES[family] for half in "AB"}
    full = {f"pipe.controlnet.{name}" for name in stored_names(many_models, family, "controlnet")}
    for component in TEXT_ENCODERS[family]:
        names = stored_names(many_models, family, component)
        if family == "qwen-image":  # files have the names of earlier transformers releases
            names = {
                name.replace("visual.", "model.visual.", 1) if name.startswith("visual.") else name for name in names
            }
            names = {
                name.replace("model.", "model.language_model.", 1)
                if name.startswith("model.") and not name.startswith("model.visual.")
                else name
                for name in names
            }
        full |= {f"pipe.{component}.{name}" for name in names}
    assert saved.keys() == lora | full


def same_files(left: str, right: str) -> bool:
    one, other = load_file(left), load_file(right)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


MIXED = {
    "everything": everything,
    "full and LoRA on one": lambda family: (
        "--trainable_models", "dit", "--lora_base_model", "dit", "--lora_target_modules", TARGETS[family],
    ),
    "modules": lambda family: (
        "--trainable_models", f"dit.{BLOCKS[family]}.0.attn,vae,controlnet.controlnet_blocks",
    ),
}  # fmt: skip
BLOCKS = {"qwen-image": "transformer_blocks", "flux": "blocks"}
FLUX_LONG = ("qwen-image", pytest.param("flux", marks=pytest.mark.long))
"""The families for what does not depend on the family."""


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("everything", "flux"),
        *((kind, "qwen-image") for kind in MIXED),
        *(pytest.param(kind, "flux", marks=pytest.mark.long) for kind in MIXED if kind != "everything"),
    ],
)
def test_a_resumed_run_restores_all_of_it_to_the_bit(train, family, kind):
    arguments = MIXED[kind](family)
    train(family, *arguments, steps=3, output="through")
    for stop in (1, 3):
        train(family, *arguments, "--resume", "auto", steps=stop, output="pieces")
    assert same_files("through/epoch-0.safetensors", "pieces/epoch-0.safetensors")
    lines = [
        [json.loads(line)["loss"] for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        for folder in ("through", "pieces")
    ]
    assert len(lines[0]) == 3 and lines[0] == lines[1]


REFERENCE_PREFIX = "pipe.controlnet.models.0."
"""Prefix of the first ControlNet in DiffSynth-Studio's scripts."""


@pytest.mark.parametrize("family", LORA_MODULES)
def test_a_controlnet_alone_is_saved_as_diffusers_reads_it(train, watch, many_models, family):
    """The frozen transformer passes gradients on; keys and base weights of the file are those of the base file."""
    train(family, "--trainable_models", "controlnet", "--remove_prefix_in_ckpt", REFERENCE_PREFIX)
    assert {name.partition(".")[0] for name in watch.changed} == {"controlnet"} and watch.without_gradient == set()
    saved = load_file("out/epoch-0.safetensors")
    assert saved.keys() == stored_names(many_models, family, "controlnet")
    held = watch.models[-1].components["controlnet"].state_dict()
    assert all(torch.equal(saved[name], held[name].bfloat16()) for name in saved)


@pytest.mark.parametrize("family", LORA_MODULES)
def test_a_lora_beside_a_frozen_controlnet(train, watch, family):
    """The ControlNet is loaded although it does not train, and its output changes the loss."""
    lora = ("--lora_base_model", "dit", "--lora_target_modules", TARGETS[family])
    train(family, *lora, output="out")
    assert set(watch.models[-1].components) == {"dit", "controlnet"}
    assert all(".lora_" in name for name in watch.changed)
    train(family, *lora, output="plain", controlled=False)
    losses = [json.loads(Path(folder, "metrics.jsonl").read_text())["loss"] for folder in ("out", "plain")]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("family", FLUX_LONG)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("--batch_size", 4), ("--gradient_accumulation_steps", 4)),
        ((), ("--use_gradient_checkpointing",)),
        ((), ("--use_gradient_checkpointing_offload",)),
    ],
    ids=str,
)
def test_batches_and_recomputed_activations_train_the_same(train, watch, family, one, other):
    gradients = []
    for folder, arguments in (("one", one), ("other", other)):
        train(family, "--trainable_models", "controlnet", *arguments, "--seed", 1, output=folder)
        (state,) = Path(folder, "state").glob("step-*")
        gradients.append(load_file(state / "optimizer.safetensors"))
    assert gradients[0].keys() == gradients[1].keys()
    moments = [name for name in gradients[0] if name.endswith("/exp_avg")]
    worst = max(float((gradients[0][name] - gradients[1][name]).abs().max()) for name in moments)
    largest = max(float(gradients[0][name].abs().max()) for name in moments)
    assert worst < 1e-6 < largest / 100


@pytest.mark.parametrize("family", FLUX_LONG)
def test_the_halves_of_split_training_train_a_controlnet_as_the_whole_does(train, family):
    """The precompute task encodes control images without the ControlNet; the train task needs no VAE."""
    arguments = ("--trainable_models", "controlnet")
    first = train(family, "--task", "sft:data_process", "--cache_path", "own_cache", output="encoded")
    assert "Loading vae" in first.err and "Loading controlnet" not in first.err
    train(family, *arguments, steps=4, output="whole")
    second = train(
        family, *arguments, "--task", "sft:train", "--dataset_base_path", "encoded", steps=4, output="halves"
    )
    assert "Loading controlnet" in second.err and "Loading vae" not in second.err
    assert same_files("whole/epoch-0.safetensors", "halves/epoch-0.safetensors")


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("qwen-image", "qwen-image-lora"), pytest.param("flux", "flux.1-dev-lora", marks=pytest.mark.long)],
)
def test_the_command_rehearses(cli, family, recipe):
    """As typed: with hub files that are missing, and a synthetic column."""
    components = (*TEXT_ENCODERS[family], "controlnet")
    outcome = cli(
        "train", "--recipe", recipe, "--rehearse", "--model_id_with_origin_paths", ",".join(PLACES[family].values()),
        *CONTROLLED, "--trainable_models", ",".join(components), "--lora_format", "diffsynth",
        "--dataset_num_workers", 0, "--max_steps", 2, "--verbose",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    for component in components:
        assert f"tensors of {component} are in the checkpoint" in outcome.out
    assert (
        "reference images (controlnet_image): 3 of 160 x 112" in outcome.err
        and "do not align with it" not in outcome.err
    )
    assert "controlnet" in outcome.err and "keys matches one of" in outcome.out


def test_modules_are_rehearsed_too(cli):
    outcome = cli(
        "train", "--recipe", "flux.1-dev-full", "--rehearse", "--trainable_models", "dit.blocks.0.attn,vae.encoder",
        "--dataset_num_workers", 0, "--max_steps", 2,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "all 12 tensors of dit are in the checkpoint" in outcome.out


# Full and LoRA on the same model


@pytest.mark.parametrize("family", LORA_MODULES)
def test_full_and_lora_on_one_model_train_both(train, watch, many_models, family):
    """Full weights keep the keys of full checkpoints, the LoRA its own: no key is used twice."""
    train(family, *MIXED["full and LoRA on one"](family), steps=2)
    lora = {name for name in watch.before if ".lora_" in name}
    assert lora and watch.trained == watch.changed
    assert any(".base_layer." in name for name in watch.changed) and lora < watch.changed
    assert watch.without_gradient <= {name for name in lora if ".lora_A." in name}
    saved = load_file("out/epoch-0.safetensors")
    keys = {f"{name}.lora_{half}.default.weight" for name in LORA_MODULES[family] for half in "AB"}
    assert saved.keys() == keys | stored_names(many_models, family, "dit")


# Modules


CASES = {
    "qwen-image": ("dit.transformer_blocks.0.attn,dit.transformer_blocks.1.img_mlp", ("transformer_blocks.0.attn.", "transformer_blocks.1.img_mlp."), "transformer_blocks.0.attn.to_q.weight"),
    "flux": ("dit.blocks.0.attn,dit.single_blocks.1.to_qkv_mlp", ("double_blocks.0.img_attn.", "double_blocks.0.txt_attn.", "single_blocks.1.linear1."), "double_blocks.0.img_attn.qkv.weight"),
}  # fmt: skip
"""What is typed, the prefix of its keys, and one of them."""


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # norms under bf16: slower
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", CASES)
def test_modules_train_and_are_saved_alone(train, watch, many_models, family, precision):
    """With another component in full; trained weights are float32 at any precision, the rest has that of the run."""
    typed, begins, example = CASES[family]
    (text, *_) = TEXT_ENCODERS[family]
    outcome = train(family, "--trainable_models", f"{typed},{text}", "--mixed_precision", precision, controlled=False)
    assert " of dit" in outcome.err.partition("Trains")[2].partition("\n")[0]
    assert watch.trained == watch.changed
    assert {name.partition(".")[0] for name in watch.trained} == {"dit", text}
    dtypes = {name: tensor.dtype for name, tensor in watch.models[-1].components.named_parameters()}
    assert {dtypes[name] for name in watch.trained} == {torch.float32}
    frozen = {dtypes[name] for name in dtypes if name.startswith("dit.") and name not in watch.trained}
    assert frozen == {torch.bfloat16 if precision == "bf16" else torch.float32}
    saved = {name for name in load_file("out/epoch-0.safetensors") if not name.startswith(f"pipe.{text}.")}
    assert saved == {name for name in stored_names(many_models, family, "dit") if name.startswith(begins)}
    assert example in saved


# VAEs and image encoders


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    write_clip(folder / "a.mp4", detailed(9, 64, 96))
    (folder / "metadata.csv").write_text("video,prompt\na.mp4,an astronaut\n")
    return folder


@pytest.mark.parametrize("family", PLACES)
def test_a_vae_trains_in_every_family_of_images(train, watch, family):
    """On its own, so that its gradients pass through a frozen transformer and through the target."""
    outcome = train(family, "--trainable_models", "vae", "--verbose", controlled=family in TEXT_ENCODERS)
    assert "the vae is trained: the prediction target is computed from its latents and changes with them" in outcome.err
    assert watch.trained == watch.changed and {name.partition(".")[0] for name in watch.trained} == {"vae"}
    assert not any(name.startswith("vae.decoder.") for name in watch.trained)
    assert watch.without_gradient == set()


@pytest.mark.parametrize(
    ("model_id", "component", "extra"),
    [(T2V, "vae", ()), (I2V, "vae", ("--extra_inputs", "input_image")), (I2V, "image_encoder", ("--extra_inputs", "input_image"))],
)  # fmt: skip
def test_a_vae_or_an_image_encoder_of_wan_trains(cli, clip, tiny_wan, watch, monkeypatch, model_id, component, extra):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_wan))
    outcome = cli(
        "train", *entries_of_wan(model_id), "--trainable_models", component, *extra, "--dataset_base_path", clip,
        "--height", 64, "--width", 96, "--num_frames", 9, "--max_steps", 1, "--output_path", "out",
        "--dataset_num_workers", 0,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert watch.trained == watch.changed and {name.partition(".")[0] for name in watch.trained} == {component}
    assert watch.without_gradient == set()


def test_a_vae_s_gradient_comes_through_what_the_model_reads_and_through_its_target(train, watch, monkeypatch, pairs):
    """As in a plain loop: x_0 = VAE(image), the mean of w (v(x_t) - (noise - x_0))^2, with nothing detached."""
    calls: list[tuple[Tensor, dict[str, Tensor]]] = []
    real = Flux.predict_velocity

    def kept(self: Flux, components: Any, noisy: Tensor, sigma: Tensor, batch: dict[str, Tensor]) -> Tensor:
        calls.append((sigma, {name: tensor.detach() for name, tensor in batch.items()}))
        return real(self, components, noisy, sigma, batch)

    monkeypatch.setattr(Flux, "predict_velocity", kept)
    (pairs / "metadata.csv").write_text("image,prompt\ncoffee.png,a cup\n")
    train("flux", "--trainable_models", "vae", controlled=False)
    _, (sigma, batch) = calls  # of the trial, and of the step
    model = watch.models[-1]
    with torch.no_grad():
        for name, parameter in model.components.named_parameters():
            parameter.copy_(watch.before[name])
    vae = model.components["vae"]
    pixels = load_pixel_tensor(MediaCrop(pairs / "coffee.png", 64, 64)).float()[None, :, 0] / 127.5 - 1
    sampled = vae.encode(pixels).latent_dist.mode()
    latents = ((sampled - vae.config.shift_factor) * vae.config.scaling_factor)[:, :, None]
    noise = draw_noise(0, 0, 0, 0, latents.shape[1:])[None]
    noisy = (1 - sigma) * latents + sigma * noise
    weight = model.objective.weights[model.objective.sigmas == sigma]
    prediction = real(Flux(), dict(model.components), noisy, sigma, batch)
    weights = [vae.get_parameter(name.removeprefix("vae.")) for name in sorted(watch.trained)]

    def gradient(target: Tensor) -> Tensor:
        loss = weight * (prediction - target).pow(2).mean()
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights, retain_graph=True)])

    # AdamW's first moment is a tenth of the first gradient.
    found = torch.cat([watch.state[f"{name}/exp_avg"].flatten() * 10 for name in sorted(watch.trained)])
    expected = gradient(noise - latents)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float((found - gradient((noise - latents).detach())).norm() / expected.norm()) > 0.1
