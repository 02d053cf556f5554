"""Which samples a run does not train on but validates on. No torch."""

from collections.abc import Iterator
from pathlib import Path

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.data.samples import SampleSet
from diffsynth_core.errors import Problem, report
from diffsynth_core.models.spec import FamilyFacts, Variant
from diffsynth_core.planning.data.dataset import read_dataset
from diffsynth_core.progress import Reporter, pluralize
from diffsynth_core.randomness import key_of

EXAMPLE = "`--validation_split 0.05`"


def split_share(split: str | None) -> float | None:
    """Return the share that a `validation_split` names; None for a path."""
    try:
        return None if split is None else float(split)
    except ValueError:
        return None


def validation_problems(parameters: Parameters) -> Iterator[Problem]:
    """Yield what is wrong with the parameters of validation, whatever the dataset."""
    split, task = parameters.validation_split, TASKS[parameters.task]
    if parameters.keep_best and (split is None or parameters.keep_checkpoints is None):
        missing = "validation_split" if split is None else "keep_checkpoints"
        why = "knows no best checkpoint" if split is None else "keeps nothing that would be deleted"
        hint = f"pass `--{missing}`, or remove `--keep_best`"
        yield Problem(f"`keep_best` {why} without `{missing}`", hint, wrong_use=True)
    if parameters.evaluate_ema and parameters.ema_decay is None:
        hint = "pass `--ema_decay 0.999`, or remove `--evaluate_ema`"
        yield Problem("`evaluate_ema` has no average without `ema_decay`", hint, wrong_use=True)
    if split is None:
        if parameters.validate_every is not None:
            hint = f"pass {EXAMPLE}, or remove `--validate_every`"
            yield Problem("`validate_every` measures nothing without `validation_split`", hint, wrong_use=True)
        if parameters.evaluate_ema and parameters.preview_prompts is None:
            what = "`evaluate_ema` has nothing to do without `validation_split` or `preview_prompts`"
            yield Problem(what, f"pass {EXAMPLE}, or remove `--evaluate_ema`", wrong_use=True)
        return
    share = split_share(split)
    if share is None and not (task.encodes and task.trains):
        what = f"`validation_split` is the path `{split}`, which the two stages of `{parameters.task}` do not share"
        yield Problem(what, f"hold out a share of the dataset: {EXAMPLE}", wrong_use=True)
    elif share is None and not Path(split).exists():
        hint = f"pass a metadata file, a dataset folder, or a share: {EXAMPLE}"
        yield Problem(f"`validation_split` `{split}` does not exist", hint)
    elif share is not None and not 0 < share < 1:
        what = f"`validation_split` `{split}` is not between 0 and 1"
        yield Problem(what, f"pass a share such as {EXAMPLE}, a metadata file, or a dataset folder", wrong_use=True)


def read_held_out(
    parameters: Parameters, facts: FamilyFacts, variant: Variant, reporter: Reporter
) -> tuple[SampleSet | None, list[Problem]]:
    """Return the samples of the file or folder in `validation_split`, None without one, and all problems."""
    split = parameters.validation_split
    if split is None or split_share(split) is not None or not Path(split).exists():
        return None, []
    path = Path(split)
    place: dict[str, Path | None] = {"dataset_metadata_path": path}
    if path.is_dir():
        place = {"dataset_base_path": path, "dataset_metadata_path": None}
    return read_dataset(parameters.model_copy(update=place), facts, variant, reporter)


def share_to_hold_out(parameters: Parameters, samples: SampleSet) -> tuple[int, ...]:
    """Return the indices of the share of the samples in `validation_split`, at least one: a pure function of seed and
    number of samples. Reports a share that leaves none to train on.
    """
    share = split_share(parameters.validation_split)
    if share is None or not 0 < share < 1:
        return ()
    count = len(samples.samples)
    held = max(1, round(share * count))
    if held == count:
        what = f"`validation_split` `{parameters.validation_split}` holds out all of {pluralize(count, 'sample')}"
        report(Problem(f"{what}, so nothing is left to train on", "pass a smaller share, a metadata file, or a folder"))
        return ()
    order = sorted(range(count), key=lambda index: key_of("held out", parameters.seed, index))
    return tuple(sorted(order[:held]))
