"""Every pair of storage, placement, optimizer and trained dtype: run, or refused in the one report."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest

from diffsynth_core.config.resolve import resolve
from diffsynth_core.errors import FaultsFound
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.planning.training.optimizers import OPTIMIZERS
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.loop import train
from tests.conftest import ENTRIES

STORAGE: dict[str, dict[str, object]] = {
    "plain": {},
    "float8": {"fp8_models": [ENTRIES["dit"]]},
    **{method: {"quant_options": f"{ENTRIES['dit']}:{method}"} for method in ("fp8", "int8", "nf4")},
}
PLACEMENT: dict[str, dict[str, object]] = {
    "device": {},
    "blocks on host": {"blocks_to_swap": 1},
    "state on host": {"enable_optimizer_cpu_offload": True},
    "fused": {"fused_backward": True},
}
TRAINED: dict[str, dict[str, object]] = {
    "LoRA": {"recipe": "qwen-image-lora", "lora_rank": 4},
    "full float32": {"recipe": "qwen-image-full"},
    "full bf16": {"recipe": "qwen-image-full", "mixed_precision": "bf16", "trained_dtype": "bf16"},
}
QUICK = 5
"""One of so many cases is run at each change."""


@dataclass(frozen=True)
class Case:
    storage: str = "plain"
    placement: str = "device"
    optimizer: str = "adamw"
    trained: str = "LoRA"

    @property
    def pairs(self) -> set[tuple[int, str, int, str]]:
        """The pairs of values, each with the number of its axis."""
        return {(*one, *other) for one, other in itertools.combinations(enumerate(astuple(self)), 2)}

    @property
    def refused(self) -> tuple[str, ...]:
        """What the message of the problem names; empty if the case runs."""
        if self.trained != "LoRA" and self.storage != "plain":
            return ("trainable_models", "fp8_models" if self.storage == "float8" else "quant_options")
        if self.optimizer == "prodigy":
            if self.trained == "full bf16":
                return ("trained_dtype", "prodigy")
            needed = {"fused": "fused_backward", "state on host": "enable_optimizer_cpu_offload"}
            if self.placement in needed:
                return (needed[self.placement], "prodigy")
            if self.placement == "blocks on host" and self.trained != "LoRA":
                return ("fused_backward", "prodigy")
        return ()

    @property
    def parameters(self) -> dict[str, object]:
        besides = {"fused_backward": True} if self.placement == "blocks on host" and self.trained != "LoRA" else {}
        return {**TRAINED[self.trained], **STORAGE[self.storage], **PLACEMENT[self.placement], **besides,
                "optimizer": self.optimizer, "learning_rate": 1.0 if self.optimizer == "prodigy" else 0.001}  # fmt: skip

    def __str__(self) -> str:
        return "-".join(astuple(self))


EVERY = [Case(*values) for values in itertools.product(STORAGE, PLACEMENT, OPTIMIZERS, TRAINED)]
RUN = [case for case in EVERY if not case.refused]


def covering() -> Iterator[Case]:
    """Yield few cases that run and have each pair that any such case has: next the one with the most new pairs."""
    left = set().union(*(case.pairs for case in RUN))
    while left:
        best = max(RUN, key=lambda case: len(case.pairs & left))
        yield best
        left -= best.pairs


REFUSED = [
    next(case for case in EVERY if pair in case.pairs and case.refused)
    for pair in sorted(set().union(*(case.pairs for case in EVERY)) - set().union(*(case.pairs for case in RUN)))
]
CASES = list(covering())


def plan(case: Case, models: Path, images: Path, folder: Path) -> RunPlan:
    given = {"dataset_base_path": str(images), "max_steps": 2, "device": "cpu", "dataset_num_workers": 0,
             "output_path": str(folder), **case.parameters}  # fmt: skip
    return make_plan(resolve(given), SilentReporter(), base=models)


def test_each_pair_is_run_or_refused():
    run, refused = (set().union(*(case.pairs for case in cases)) for cases in (CASES, REFUSED))
    assert run | refused == set().union(*(case.pairs for case in EVERY)) and len(CASES) <= 45


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=[] if number % QUICK == 0 else [pytest.mark.long])
        for number, case in enumerate(CASES)
    ],
)
def test_it_runs(case, tiny_models, photographs, tmp_path):
    folder = train(plan(case, tiny_models, photographs, tmp_path / "run"), SilentReporter(), StopRequest()).folder
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    assert json.loads((folder / "run.json").read_text())["status"] == "completed"


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_it_is_refused(case, tiny_models, photographs, tmp_path):
    with pytest.raises(FaultsFound) as raised:
        plan(case, tiny_models, photographs, tmp_path / "run")
    messages = [f"{problem.message} {problem.hint}" for problem in raised.value.problems]
    assert any(all(name in message for name in case.refused) for message in messages), messages
    assert not (tmp_path / "run").exists()
