"""Runs that are killed at random moments can be resumed at the first attempt, end with the same bytes, and leave no
process.

They are forked from this process, after a run in it has imported everything: a kill costs seconds, not a minute.
`DIFFSYNTH_TEST_KILLS=40` runs the whole series; the moments are drawn from `DIFFSYNTH_TEST_SEED`.
"""

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffsynth_cli.main import main
from tests.killing import GONE_SECONDS, ForkedRun, steps_done

KILLS = int(os.environ.get("DIFFSYNTH_TEST_KILLS", "2"))
SEED = int(os.environ.get("DIFFSYNTH_TEST_SEED", "0"))
STEPS = 8
RECIPES = {
    "qwen-image": (),
    "flux.2-klein-4b": (),
    "wan2.1-t2v-1.3b": ("--height", "32", "--width", "48", "--num_frames", "1"),
}
"""A recipe of each of three families, without the kind of training, with flags for a small run."""


@dataclass(frozen=True)
class Kill:
    """A run, and when it is killed: seconds after it reached `phase`."""

    recipe: str
    kind: str
    workers: int
    phase: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.recipe}-{self.kind}-{self.workers} workers-{self.phase}+{self.seconds:.2f}s"


def _kills() -> list[Kill]:
    """Return kills of every phase equally often, in turn, at random moments."""
    drawn, kills = random.Random(SEED), []
    for number in range(KILLS):
        phase = ("training", "encoding", "saving", "loading")[number % 4]
        longest = {"encoding": 1.0, "loading": 0.5, "training": 1.0, "saving": 0.2}[phase]
        recipe = list(RECIPES)[(number // 4 + number) % 3]
        kind = ("lora", "full")[(number // 4 + number // 2) % 2]
        kills.append(Kill(recipe, kind, (8, 0)[(number + number // 8) % 2], phase, drawn.uniform(0, longest)))
    return kills


@pytest.fixture(scope="module")
def through(recipe_models, photographs, tmp_path_factory):
    """The files of an uninterrupted run, by recipe and kind; and its arguments."""
    folder = tmp_path_factory.mktemp("through")
    clips = folder / "clips.csv"  # Wan takes images as clips of one frame
    clips.write_text((photographs / "metadata.csv").read_text(encoding="utf-8").replace("image", "video", 1))
    known: dict[tuple[str, str], dict[str, bytes]] = {}

    def words(recipe: str, kind: str, output: Path) -> list[str]:
        dataset = ["--dataset_base_path", str(photographs)]
        dataset += ["--dataset_metadata_path", str(clips)] if recipe.startswith("wan") else []
        size = ["--max_steps", str(STEPS), "--dataset_repeat", "10", "--save_steps", "3", "--device", "cpu"]
        places = ["--cache_path", str(output.with_name(f"{output.name}-cache")), "--output_path", str(output)]
        return ["--recipe", f"{recipe}-{kind}", *RECIPES[recipe], *dataset, *size, *places]

    def find(recipe: str, kind: str) -> dict[str, bytes]:
        if (recipe, kind) not in known:
            output = folder / f"{recipe}-{kind}"
            command = [*words(recipe, kind, output), "--dataset_num_workers", "0"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(recipe_models(f"{recipe}-{kind}")))
                assert main(["train", *command]) == 0
            known[recipe, kind] = checkpoints(output)
        return known[recipe, kind]

    find.words = words
    return find


def checkpoints(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kill", _kills(), ids=str)
def test_a_killed_run_goes_on_to_the_same_bytes(through, recipe_models, tmp_path, kill):
    output, models = tmp_path / "out", recipe_models(f"{kill.recipe}-{kill.kind}")
    expected = through(kill.recipe, kill.kind)
    words = [*through.words(kill.recipe, kill.kind, output), "--dataset_num_workers", str(kill.workers)]
    begun = {
        "encoding": lambda: "Loading " in run.stderr(),
        "loading": lambda: "Encoding latents: 4 of 4" in run.stderr(),
        "training": lambda: steps_done(output) > 0,
        "saving": lambda: "Saved `" in run.stderr(),
    }
    with ForkedRun(words, models, tmp_path) as run:
        assert run.wait_until(begun[kill.phase]), run.stderr()
        time.sleep(kill.seconds)  # the moment is what is drawn
        run.process.kill()
        killed = time.monotonic()
        run.process.wait()
        where = f"{steps_done(output)} steps done"
        with ForkedRun([*words, "--resume", "auto"], models, tmp_path) as again:
            assert time.monotonic() - killed < GONE_SECONDS
            run.wait_until_gone(killed + GONE_SECONDS - time.monotonic())
            code = again.process.wait()
            assert code == 0, again.stderr()
            assert checkpoints(output) == expected
            again.wait_until_gone(GONE_SECONDS)
    print(f"{kill}: killed with {where}, resumed at the first try")
