"""Every engine trains in two processes what one process trains with accumulation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffsynth_core.models.registry import load_family
from tests.runs.engines import (
    CHANGES,
    CONTROLNET,
    ENGINES,
    NESTED,
    OBJECTIVES,
    RECIPES,
    TASKS,
    TwoProcesses,
    difference,
    flags_of,
    losses_of,
    noise_of,
    train_here,
)

Case = tuple[str, str, tuple[str, ...]]
"""Family, task, and further flags."""
CASES: list[Case] = [(family, task, ()) for family in RECIPES for task in TASKS]
OTHERS: list[Case] = [("qwen-image", task, flags) for task, flags in CHANGES.values()]
WITHOUT_NESTED = [("qwen-image", task, flags) for name, (task, flags) in CHANGES.items() if name != NESTED]
COMPILED: list[Case] = [("qwen-image", task, ("--compile",)) for task in TASKS]
MORE: list[Case] = [("qwen-image", task, flags) for task, flags in OBJECTIVES.values()]
OF_EACH_KIND = ("fsdp2", "fsdp2 offload", "zero2", "zero3 offload")


@dataclass
class Place:
    """Where the cases train."""

    models: Path
    photographs: Path
    folder: Path
    two_processes: TwoProcesses
    alone: dict[Case, Path] = field(default_factory=dict)

    def flags(self, case: Case) -> tuple[str, ...]:
        family, task, more = case
        metadata = self.folder / ("video.csv" if family == "wan" else "image.csv")
        dataset = ("--dataset_base_path", str(self.photographs), "--dataset_metadata_path", str(metadata))
        return (*flags_of(family, task), *dataset, *(flag.replace("{folder}", str(self.folder)) for flag in more))

    def output(self) -> Path:
        """A folder that does not exist."""
        return self.folder / f"out-{len(list(self.folder.iterdir()))}"

    def train_alone(self, output: Path, *flags: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(self.models))
            patch.chdir(self.folder)
            train_here({output: flags})
        return output

    def train_in_two(self, engine: str, cases: dict[Path, tuple[str, ...]]) -> None:
        self.two_processes.train(engine, cases, self.models)

    def reference(self, case: Case) -> Path:
        """The folder of a case in one process, which trains it once."""
        if case not in self.alone:
            flags = (*self.flags(case), "--gradient_accumulation_steps", "4")
            self.alone[case] = self.train_alone(self.output(), *flags)
        return self.alone[case]


@pytest.fixture(scope="module")
def place(recipe_models, photographs, two_processes, tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("engines")
    header, *rows = (photographs / "metadata.csv").read_text(encoding="utf-8").splitlines()
    for column in ("image", "video"):  # Wan takes images as clips of one frame
        lines = [header.replace("image", column), *rows[:3]]
        (folder / f"{column}.csv").write_text("\n".join(lines), encoding="utf-8")
    images = [row.partition(",")[0] for row in rows[:3]]
    pairs = [f"{image},{images[0]},a cat" for image in images]
    (folder / "pairs.csv").write_text("\n".join(["image,controlnet_image,prompt", *pairs]), encoding="utf-8")
    sampled = [f"{image},a cat,{seed},cpu,2,1" for seed, image in enumerate(images)]
    columns = "image,prompt,seed,rand_device,num_inference_steps,cfg_scale"
    (folder / "distilled.csv").write_text("\n".join([columns, *sampled]), encoding="utf-8")
    models = recipe_models(*(f"{RECIPES[family]}-{task}" for family, task, _ in CASES))
    load_family("qwen-image").write_tiny_weights(models, "controlnet", *CONTROLNET.split(":"))
    return Place(models, photographs, folder, two_processes)


QUICK = ("fsdp2", "zero2", "zero3")
"""Engines that are started in every run of the tests."""
GROUPS = [
    pytest.param(engine, cases, id=f"{engine}-{name}", marks=() if engine in QUICK and quick else pytest.mark.long)
    for name, cases, engines, quick in (
        ("qwen-image", CASES[:2], ENGINES, True),
        ("others", CASES[2:], ENGINES, False),
        ("changes", OTHERS, OF_EACH_KIND[:-1], False),
        ("changes", WITHOUT_NESTED, OF_EACH_KIND[-1:], False),  # ZeRO-3 refuses them
        ("objectives", MORE, ("fsdp2",), False),
        ("compiled", COMPILED[:1], ("zero1",), False),
        ("compiled", COMPILED, ("zero2",), False),
    )
    for engine in engines
]
"""What one start of the processes trains."""


# As in tests/runs/test_compiled.py, for those that compile.
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("engine", "cases"), GROUPS)
def test_an_engine_trains_what_one_process_does(place, engine, cases):
    first = place.output().name
    outputs = {case: place.folder / f"{first}-{number}" for number, case in enumerate(cases)}
    flags = {output: (*place.flags(case), "--gradient_accumulation_steps", "2") for case, output in outputs.items()}
    place.train_in_two(engine, flags)
    for case, output in outputs.items():
        losses, weights = difference(place.reference(case), output)
        print(f"{engine}, {case}: losses off by {losses:.1e}, weights by {weights:.1e}")
        assert losses < 1e-5 and weights < 1e-5


BF16 = ("--mixed_precision", "bf16")
IN_BF16: list[Case] = [
    ("qwen-image", "lora", BF16),
    ("qwen-image", "full", BF16),
    ("wan", "full", BF16),  # some of its weights are float32 in any case
    ("qwen-image", "full", (*BF16, "--trained_dtype", "bf16")),
]


@pytest.fixture
def noise(place) -> Callable[[Case], tuple[float, float]]:
    """What one process differs from itself: see `noise_of`."""

    def measure(case: Case) -> tuple[float, float]:
        def train() -> Path:
            return place.train_alone(place.output(), *place.flags(case), "--gradient_accumulation_steps", "4")

        return noise_of(place.reference(case), train)

    return measure


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # of autocast on a CPU
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2 offload", *QUICK])
def test_in_bf16_it_differs_no_more_than_one_process_does_in_another_order(place, noise, engine):
    # DeepSpeed updates float32 copies of bf16 weights, which is what one process does with float32 weights.
    cases = [case for case in IN_BF16 if engine in ("ddp", "fsdp2") or "--trained_dtype" not in case[2]]
    outputs = {case: place.folder / f"bf16-{engine}-{number}" for number, case in enumerate(cases)}
    flags = {output: (*place.flags(case), "--gradient_accumulation_steps", "2") for case, output in outputs.items()}
    place.train_in_two(engine, flags)
    for case, output in outputs.items():
        losses, weights = difference(place.reference(case), output)
        of_losses, of_weights = noise(case)
        print(f"{engine}, {case}: losses {losses:.1e} ({of_losses:.1e}), weights {weights:.1e} ({of_weights:.1e})")
        assert losses <= 2 * of_losses and weights <= 2 * of_weights


@pytest.mark.long
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero2 offload", "zero3"])
def test_deepspeed_goes_on_in_bf16_to_the_bit(place, engine):
    """Weights and averages are float32 in a state and a checkpoint, although it computes with bf16 copies."""
    more = (*BF16, "--dataset_repeat", "6", "--save_steps", "3", "--ema_decay", "0.5")
    through, stopped = (
        {family: place.folder / f"{engine}-{kind}-{family}" for family in ("qwen-image", "wan")}
        for kind in ("through", "stopped")
    )
    for outputs, pieces in ((through, ("6",)), (stopped, ("3", "6"))):
        for last in pieces:
            runs = {
                output: (*place.flags((family, "full", more)), "--max_steps", last, "--resume", "auto")
                for family, output in outputs.items()
            }
            place.train_in_two(engine, runs)
    for family in through:
        assert difference(through[family], stopped[family]) == (0, 0)
        averages = [output[family] / "step-6.ema.safetensors" for output in (through, stopped)]
        assert averages[0].read_bytes() == averages[1].read_bytes()
        state = load_file(through[family] / "state" / "step-6" / "trained.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        rounded = [name for name, tensor in state.items() if torch.equal(tensor, tensor.bfloat16().float())]
        assert len(rounded) < len(state) / 2, "updates are not rounded"


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "other"),
    [("fsdp2", "zero2"), ("zero2", "fsdp2"), ("fsdp2 offload", "zero3 offload"), ("zero3 offload", "fsdp2 offload")],
)
def test_a_run_goes_on_in_one_process_and_in_two_with_another_engine(place, engine, other):
    """Of nine steps, three each; the losses are those of a run that never stopped."""
    more = ("--dataset_repeat", "6", "--save_steps", "3")
    outputs = {place.folder / f"{engine}-resumed-{task}": place.flags(("qwen-image", task, more)) for task in TASKS}
    for last, trained_by in (("3", engine), ("6", None), ("9", other)):
        pieces = {output: (*flags, "--max_steps", last, "--resume", "auto") for output, flags in outputs.items()}
        if trained_by is None:
            for output, flags in pieces.items():
                place.train_alone(output, *flags, "--gradient_accumulation_steps", "2")
        else:
            place.train_in_two(trained_by, pieces)
    for output, flags in outputs.items():
        through = place.train_alone(place.output(), *flags, "--max_steps", "9", "--gradient_accumulation_steps", "2")
        assert len(losses_of(output)) == 9
        losses, weights = difference(through, output)
        print(f"{engine}, one process, {other}: losses off by {losses:.1e}, weights by {weights:.1e}")
        assert losses < 1e-5 and weights < 1e-5
