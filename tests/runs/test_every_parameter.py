"""Each parameter has its effect: two runs that differ only in it, and the difference between them.

Ignoring a parameter would make both equal. `tests/proofs.yaml` names the test of each parameter, some of which are in
other files.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffsynth_cli import launching
from diffsynth_core.config.resolve import resolve
from tests.conftest import ENTRIES
from tests.outcome import Outcome

RECIPE = ("--recipe", "qwen-image-lora", "--dataset_num_workers", 0, "--lora_rank", 2)
SHORT = ("--dataset_repeat", 1, "--num_epochs", 1, "--max_steps", 2)


@dataclass(frozen=True)
class Ended:
    """A run that has ended, or was rejected."""

    outcome: Outcome
    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        return content

    def metrics(self, name: str) -> list[Any]:
        return [json.loads(line)[name] for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def log(self) -> str:
        return (self.folder / "train.log").read_text()

    @property
    def files(self) -> list[str]:
        return [entry["file"] for entry in self.record["checkpoints"]]

    @property
    def states(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "state").iterdir())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / self.files[-1])

    @property
    def refusal(self) -> str | None:
        """The first problem of a run that was rejected."""
        return next((line for line in self.outcome.err.splitlines() if line.startswith("error: ")), None)

    def says(self, text: str) -> bool:
        return text in self.outcome.err + self.outcome.out


@dataclass(frozen=True)
class Effect:
    """Flags that set a parameter, what shows its effect, and the flags of both runs."""

    flags: tuple[object, ...]
    observe: Callable[[Ended], object]
    expected: object
    besides: tuple[object, ...] = SHORT


def says(text: str) -> Callable[[Ended], bool]:
    return lambda run: run.says(text)


def lora_shape(run: Ended) -> list[int]:
    return list(run.tensors["transformer_blocks.0.attn.to_q.lora_A.default.weight"].shape)


def modules(run: Ended) -> set[str]:
    """Return the last parts of the module names in a LoRA file."""
    return {name.partition(".lora_")[0].rpartition(".")[2] for name in run.tensors}


ALL = (*SHORT, "--max_steps", 100)
TWO_FILES = f"{ENTRIES['dit']},{ENTRIES['text_encoder']}"
EFFECTS: dict[str, Effect] = {
    "max_steps": Effect(("--max_steps", 1), lambda run: len(run.metrics("step")), 1),
    "device": Effect(("--device", "cuda:7"), lambda run: "is not available" in (run.refusal or ""), True),
    "mixed_precision": Effect(("--mixed_precision", "bf16"), lambda run: run.record["mixed_precision"], "bf16"),
    "dataset_base_path": Effect(("--dataset_base_path", "{one}"), lambda run: run.metrics("epoch"), [0], ALL),
    "dataset_metadata_path": Effect(
        ("--dataset_metadata_path", "{dataset}/two.csv"), lambda run: len(run.metrics("step")), 2, ALL
    ),
    "dataset_repeat": Effect(("--dataset_repeat", 2), lambda run: len(run.metrics("step")), 8, ALL),
    "data_file_keys": Effect(
        ("--data_file_keys", "video"), lambda run: "does not include `image`" in (run.refusal or ""), True
    ),
    "batch_size": Effect(("--batch_size", 2), lambda run: run.metrics("samples_seen"), [2, 4]),
    "cache_path": Effect(
        ("--cache_path", "{work}/own"), lambda run: (run.folder.parent / "own/encodings").is_dir(), True
    ),
    "height": Effect(("--height", 32, "--width", 64), says("4 of 64 x 32"), True),
    "width": Effect(("--height", 64, "--width", 32), says("4 of 32 x 64"), True),
    "max_pixels": Effect(("--max_pixels", 1024), says("4 of 32 x 32"), True),
    "model_id_with_origin_paths": Effect(
        ("--model_id_with_origin_paths", TWO_FILES), lambda run: "no vae weights" in (run.refusal or ""), True
    ),
    "offload_models": Effect(
        ("--offload_models", "x:y"), lambda run: "not an entry of the model" in (run.refusal or ""), True
    ),
    "learning_rate": Effect(("--learning_rate", "3e-5"), lambda run: run.metrics("lr"), [3e-5, 3e-5]),
    "lr_scheduler": Effect(("--lr_scheduler", "linear"), lambda run: run.metrics("lr"), [1e-4, 5e-5]),
    "lr_warmup_steps": Effect(("--lr_warmup_steps", 2), lambda run: run.metrics("lr"), [5e-5, 1e-4]),
    "num_epochs": Effect(
        ("--num_epochs", 2), lambda run: run.files, ["epoch-0.safetensors", "epoch-1.safetensors"], ALL
    ),
    "trainable_models": Effect(
        ("--trainable_models", "vae"), lambda run: "pipe.vae.encoder.conv_in.weight" in run.tensors, True
    ),
    "task": Effect(("--task", "direct_distill"), lambda run: run.refusal is not None, True),
    "find_unused_parameters": Effect(
        ("--no_find_unused_parameters",), lambda run: "unused parameters are excluded" in run.log, False
    ),
    "lora_base_model": Effect(
        ("--lora_base_model", "text_encoder", "--lora_target_modules", "q_proj"), modules, {"q_proj"}
    ),
    "lora_target_modules": Effect(("--lora_target_modules", "to_k"), modules, {"to_k"}),
    "lora_rank": Effect(("--lora_rank", 3), lambda run: lora_shape(run)[0], 3),
    "lora_format": Effect(
        ("--lora_format", "kohya"),
        lambda run: sorted({name.partition("_transformer")[0] for name in run.tensors}),
        ["lora_unet"],
    ),
    "gradient_accumulation_steps": Effect(
        ("--gradient_accumulation_steps", 2), lambda run: run.metrics("samples_seen"), [2, 4]
    ),
    "output_path": Effect(("--output_path", "{work}/named"), lambda run: (run.folder.parent / "named").is_dir(), True),
    "remove_prefix_in_ckpt": Effect(
        ("--remove_prefix_in_ckpt", "pipe."), lambda run: {name.partition(".")[0] for name in run.tensors}, {"dit"}
    ),
    "save_steps": Effect(("--save_steps", 1), lambda run: run.files, ["step-1.safetensors", "step-2.safetensors"]),
    "save_state_steps": Effect(("--save_state_steps", 1), lambda run: run.states, ["step-1", "step-2"]),
    "keep_states": Effect(("--keep_states", 1), lambda run: run.states, ["step-2"], (*SHORT, "--save_state_steps", 1)),
    "save_dtype": Effect(
        ("--save_dtype", "bfloat16"), lambda run: {tensor.dtype for tensor in run.tensors.values()}, {torch.bfloat16}
    ),
    "tokenizer_path": Effect(
        ("--tokenizer_path", "{work}/none"), lambda run: "no tokenizer found" in (run.refusal or ""), True
    ),
}
"""Parameter -> what shows its effect in one run, and not in the other."""

LOSSES: dict[str, tuple[object, ...]] = {
    "seed": ("--seed", 1),
    "max_timestep_boundary": ("--max_timestep_boundary", 0.3),
    "min_timestep_boundary": ("--min_timestep_boundary", 0.7),
}
"""Parameters that change the loss of the first step."""
WEIGHTS: dict[str, tuple[object, ...]] = {
    "weight_decay": ("--weight_decay", 0.5),
    "adam_betas": ("--adam_betas", "0.9,0.5"),
    "optimizer_args": ("--optimizer_args", "eps=0.1"),
    "max_grad_norm": ("--max_grad_norm", "1e-9"),
}
"""Parameters that change the weights after equal losses."""


@pytest.fixture(scope="module")
def dataset(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, with metadata of the first two; beside them a folder of one."""
    folder = tmp_path_factory.mktemp("every_parameter")
    dataset, one = Path(shutil.copytree(photographs, folder / "images")), folder / "one"
    rows = (dataset / "metadata.csv").read_text().splitlines()
    (dataset / "two.csv").write_text("\n".join(rows[:3]) + "\n")
    one.mkdir()
    shutil.copy(photographs / "chelsea.png", one)
    (one / "chelsea.txt").write_text("a cat")
    return dataset


@pytest.fixture
def run(cli: Callable[..., Outcome], dataset: Path) -> Callable[..., Ended]:
    """Train on the photographs; `{dataset}`, `{one}` and `{work}` in flags are folders."""
    names = {"dataset": dataset, "one": dataset.parent / "one", "work": Path.cwd()}
    count = iter(range(9))

    def start(*flags: object, output: Path | None = None) -> Ended:
        folder = output or Path.cwd() / f"out-{next(count)}"
        words = [str(flag).format(**names) for flag in flags]
        base = ("--dataset_base_path", dataset, "--output_path", folder)
        return Ended(cli("train", *RECIPE, *base, *words), folder)

    return start


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[object, ...], Ended]]:
    """The runs that others are held against, each done once, by its flags; and a folder for them."""
    return tmp_path_factory.mktemp("plain"), {}


@pytest.fixture
def plain(run: Callable[..., Ended], known: tuple[Path, dict[tuple[object, ...], Ended]]) -> Callable[..., Ended]:
    """A run without the parameter that is looked at. It must not be changed."""
    folder, runs = known

    def find(*flags: object) -> Ended:
        if flags not in runs:
            runs[flags] = run(*flags, output=folder / str(len(runs)) / "out")
            assert runs[flags].outcome.code == 0, runs[flags].outcome.err
        return runs[flags]

    return find


LARGE_STEPS = (*SHORT, "--learning_rate", 0.01)


@pytest.mark.parametrize("name", EFFECTS)
def test_a_parameter_has_its_effect(run, plain, name):
    effect = EFFECTS[name]
    assert effect.observe(plain(*effect.besides)) != effect.expected
    given = run(*effect.besides, *effect.flags)
    assert effect.observe(given) == effect.expected, given.outcome.err


def test_equal_parameters_give_equal_runs(run, plain):
    """Else the differences below would prove nothing."""
    assert run(*SHORT).metrics("loss") == plain(*SHORT).metrics("loss")
    first, again = plain(*LARGE_STEPS), run(*LARGE_STEPS)
    assert first.metrics("loss") == again.metrics("loss")
    assert first.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())


@pytest.mark.parametrize("name", LOSSES)
def test_a_parameter_changes_the_loss(run, plain, name):
    assert run(*SHORT, *LOSSES[name]).metrics("loss")[0] != plain(*SHORT).metrics("loss")[0]


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_parameter_changes_the_weights_and_not_the_loss(run, plain, name):
    first, other = plain(*LARGE_STEPS), run(*LARGE_STEPS, *WEIGHTS[name])
    assert first.metrics("loss")[0] == other.metrics("loss")[0]
    tensors = other.tensors
    assert any(not torch.equal(tensor, tensors[name]) for name, tensor in first.tensors.items())


@pytest.mark.parametrize("name", ["use_gradient_checkpointing", "use_gradient_checkpointing_offload"])
def test_checkpointing_computes_blocks_twice_to_the_same_end(run, monkeypatch, name):
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    from diffsynth_core.planning.memory import host_memory

    calls: list[int] = []
    real = QwenImageTransformerBlock.forward

    def counting(self, *arguments, **named):
        calls.append(1)
        return real(self, *arguments, **named)

    monkeypatch.setattr(QwenImageTransformerBlock, "forward", counting)
    monkeypatch.setattr(host_memory, "host_problems", lambda plan: [])  # the estimate would call blocks too
    off = "--no_use_gradient_checkpointing"
    without = run(*SHORT, off)
    once = len(calls)
    given = run(*SHORT, off, f"--{name}")
    assert len(calls) == 3 * once
    assert without.metrics("loss") == given.metrics("loss")


def test_nested_checkpointing_computes_parts_of_blocks_three_times(run, monkeypatch):
    from diffusers.models.attention import FeedForward

    from diffsynth_core.planning.memory import host_memory

    calls: list[int] = []
    real = FeedForward.forward
    monkeypatch.setattr(FeedForward, "forward", lambda self, states: calls.append(1) or real(self, states))
    monkeypatch.setattr(host_memory, "host_problems", lambda plan: [])  # the estimate would call blocks too
    whole = run(*SHORT)
    once = len(calls) // 2
    nested = run(*SHORT, "--checkpointing", "nested")
    unused = 3  # of the last block the text: nothing asks for its gradient, in two steps and the trial before them
    assert len(calls) == 5 * once - unused
    assert whole.metrics("loss") == nested.metrics("loss")


@pytest.mark.parametrize(("flags", "expected"), [((), "cuda"), (("--initialize_model_on_cpu",), "cpu")])
def test_weights_are_loaded_where_they_are_asked_for(cli, photographs, monkeypatch, flags, expected):
    """With a GPU as the device, in a run that ends before it needs one."""
    from diffsynth_core.training import model, setup

    class Loaded(Exception):
        pass

    def load(plan, family, component, dtype, device, *_):
        raise Loaded(device.type)

    monkeypatch.setattr(model, "load_for_run", load)
    real = setup.build_training_module
    monkeypatch.setattr(
        setup,
        "build_training_module",
        lambda plan, family, device, *rest: real(plan, family, torch.device("cuda"), *rest),
    )
    outcome = cli("train", *RECIPE, *SHORT, "--dataset_base_path", photographs, "--output_path", "out", *flags)
    assert f"internal error: Loaded: {expected}" in outcome.err


def test_a_configuration_goes_to_the_launcher(run, monkeypatch):
    """With one process, which otherwise trains without a launcher."""
    started: list[list[str]] = []

    class Launcher(AbstractContextManager):
        def __init__(self, command, **_):
            started.append(command)

        def __exit__(self, *_):
            return None

        def wait(self):
            return 0

    monkeypatch.setattr(launching.subprocess, "Popen", Launcher)
    assert run(*SHORT).outcome.code == 0
    assert started == []
    assert run(*SHORT, "--device", "cpu", "--num_processes", 1, "--accelerate_config", "ddp").outcome.code == 0
    ((*_, config),) = [command[: command.index("--config_file") + 2] for command in started]
    assert config.endswith("/accelerate/ddp.yaml")


def test_data_is_loaded_by_so_many_workers(run, monkeypatch, tmp_path):
    from diffsynth_core.training import encode, loader

    asked = []
    for module in (encode, loader):
        real = module.iterate
        monkeypatch.setattr(module, "iterate", lambda *given, real=real: asked.append(given[-1]) or real(*given))
    run(*SHORT, "--cache_path", tmp_path / "own", "--dataset_num_workers", 2)
    assert asked == [2, 2, 2]  # two encoders, then training


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("flux.1-dev-lora", "tokenizer_1_path"),
        ("flux.1-dev-lora", "tokenizer_2_path"),
        ("qwen-image-edit-lora", "processor_path"),
    ],
)
def test_a_folder_is_looked_for_where_it_is_named(cli, recipe_models, photographs, monkeypatch, recipe, name):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(recipe_models(recipe)))
    outcome = cli("train", "--recipe", recipe, "--dataset_base_path", photographs, f"--{name}", "elsewhere")
    assert "at `elsewhere`" in outcome.err and f"hint: set its folder with `--{name}`" in outcome.err


def test_zero_cond_t_changes_what_is_predicted(cli, recipe_models, photographs, tmp_path, monkeypatch):
    recipe = "qwen-image-edit-2509-lora"
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(recipe_models(recipe)))
    rows = [{"image": "chelsea.png", "edit_image": "coffee.png", "prompt": "a cat"}]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    losses = []
    for flags in ((), ("--zero_cond_t",), ()):
        folder = Path(f"out-{len(losses)}")
        dataset = ("--dataset_base_path", photographs, "--dataset_metadata_path", tmp_path / "pairs.json")
        small = (*SHORT, "--dataset_num_workers", 0, "--max_pixels", 4096, "--output_path", folder)
        losses.append(Ended(cli("train", "--recipe", recipe, *dataset, *small, *flags), folder).metrics("loss"))
    assert losses[0] == losses[2] and losses[0][0] != losses[1][0]


def test_zero_cond_t_is_taken_from_a_model_that_says_it(cli, recipe_models, photographs, tmp_path, monkeypatch):
    """`--no-zero_cond_t` overrides config.json."""
    recipe = "qwen-image-edit-2509-lora"
    base = Path(shutil.copytree(recipe_models(recipe), tmp_path / "base"))
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(base))
    (entry, *_) = resolve({"recipe": recipe}).parameters.model_id_with_origin_paths
    model_id, place = entry.split(":")
    config = (base / model_id / place).parent / "config.json"
    rows = [{"image": "chelsea.png", "edit_image": "coffee.png", "prompt": "a cat"}]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    losses = []
    for said, flags in ((False, ()), (True, ()), (True, ("--no-zero_cond_t",))):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"zero_cond_t": said}))
        folder = Path(f"out-{len(losses)}")
        dataset = ("--dataset_base_path", photographs, "--dataset_metadata_path", tmp_path / "pairs.json")
        small = (*SHORT, "--dataset_num_workers", 0, "--max_pixels", 4096, "--output_path", folder)
        losses.append(Ended(cli("train", "--recipe", recipe, *dataset, *small, *flags), folder).metrics("loss"))
    assert losses[0] == losses[2] and losses[0][0] != losses[1][0]
