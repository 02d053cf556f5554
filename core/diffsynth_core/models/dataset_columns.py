"""What a run reads of its dataset, from its parameters and its kind of model: columns, sizes, frames. No torch."""

from collections.abc import Mapping, Sequence

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.data.columns import LEAVE_OUT
from diffsynth_core.data.conditions import Columns, Condition, TargetSpec
from diffsynth_core.data.images import SizeRule
from diffsynth_core.data.media import FrameRule, MediaRule
from diffsynth_core.errors import Problem, suggest
from diffsynth_core.models.registry import all_conditions, all_frame_inputs, all_later_inputs
from diffsynth_core.models.spec import FamilyFacts, Variant

TEXT_COLUMN = "prompt"
TARGET_COLUMNS = ("video", "image")
"""Where no model is known, the first of them that the metadata has is what is trained on."""
MASKS = tuple(
    Condition(name, name, size="target", media="mask") for name in ("mask", "inpaint_mask", "controlnet_inpaint_mask")
)
"""Columns whose images say which pixels of the target count; no family trains on them yet."""


def columns_of_run(parameters: Parameters, facts: FamilyFacts, variant: Variant) -> Columns:
    """The columns that a run reads."""
    sampling = TASKS[parameters.task].columns
    return Columns(facts.text_column, variant.target.column, variant.conditions, sampling, values=variant.values)


def general_columns(present: Sequence[str], file_columns: Sequence[str]) -> Columns:
    """What the columns `present` hold where no model is known: of conditions, at which size they are read is not known.

    `file_columns`: columns that hold files, as `--data_file_keys` has them.
    """
    target = next((name for name in TARGET_COLUMNS if name in present), TARGET_COLUMNS[-1])
    masks = {mask.column: mask for mask in MASKS}
    known = all_conditions()
    named = dict.fromkeys((*TARGET_COLUMNS, *known, *all_frame_inputs(), *file_columns))
    references = [name for name in named if name in present and name not in (target, *masks)]
    conditions = (
        *(Condition(name, name, "target" if name in known and known[name].aligned else None) for name in references),
        *(mask for column, mask in masks.items() if column in present),
    )
    of_tasks = tuple(dict.fromkeys(name for task in TASKS.values() for name in task.columns))
    return Columns(TEXT_COLUMN, target, conditions, others=of_tasks)


def media_rule(parameters: Parameters, target: TargetSpec) -> MediaRule:
    """How the files that are trained on are read."""
    size = SizeRule(parameters.height, parameters.width, parameters.max_pixels, target.size_factor)
    # A fixed size was chosen, as was an area below the usual one.
    usual = 0 if parameters.height and parameters.width else min(target.usual_pixels, parameters.max_pixels)
    frames = FrameRule(
        parameters.num_frames, target.frame_step, parameters.frame_rate, parameters.clip_start, parameters.seed
    )
    return MediaRule(size, frames if target.kind == "video" else None, usual)


def shown_frames(parameters: Parameters, variant: Variant) -> tuple[str, ...]:
    """Return the extra inputs that make frames of the target clip a condition."""
    if variant.target.kind != "video" or variant.num_conditioning_frames:
        return ()
    return tuple(parameters.extra_inputs)


def column_hints(parameters: Parameters, facts: FamilyFacts, variant: Variant) -> Mapping[str, str]:
    """Column -> what makes it be read, or why nothing does, for columns that this run does not read."""
    hints = dict.fromkeys(all_conditions(), f"other families read it; {LEAVE_OUT}")
    hints |= dict.fromkeys(all_later_inputs(), f"this condition is not supported yet; {LEAVE_OUT}")
    hints |= {
        name: f"`{name}` is a frame of the clip itself, enabled with `--extra_inputs`; the column can be removed"
        for name in all_frame_inputs()
    }
    objective = next(name for name, task in TASKS.items() if task.columns)
    hints |= dict.fromkeys(TASKS[objective].columns, f"`--task {objective}` reads it")
    for name in dict.fromkeys(condition.column for condition in facts.conditions):
        inputs = tuple(dict.fromkeys((*parameters.extra_inputs, name)))
        keys = dict.fromkeys((*parameters.data_file_keys, name))
        together = set(inputs) <= set(facts.variant({}, inputs, "").accepted_inputs)
        hints[name] = (
            f"to train on it, pass `--data_file_keys {','.join(keys)} --extra_inputs {','.join(inputs)}`"
            if name in variant.accepted_inputs and together
            else f"{variant.title} does not read it; {LEAVE_OUT}"
        )
    return hints


def setting_problems(parameters: Parameters, variant: Variant) -> list[Problem]:
    """Parameters that decide how the dataset is read, and that this kind of model cannot be trained with."""
    return [
        *size_problems(parameters.height, parameters.width, parameters.num_frames, variant),
        *_input_problems(parameters, variant),
        *_file_key_problems(parameters, variant),
    ]


def _file_key_problems(parameters: Parameters, variant: Variant) -> list[Problem]:
    """Columns of files that the model needs and that `data_file_keys` leaves out."""
    needed = dict.fromkeys((variant.target.column, *(condition.column for condition in variant.conditions)))
    keys = dict.fromkeys((*parameters.data_file_keys, *needed))
    return [
        Problem(
            f"`data_file_keys` does not include `{column}`, whose files this run reads",
            f"pass `--data_file_keys {','.join(keys)}`",
            wrong_use=True,
        )
        for column in needed
        if column not in parameters.data_file_keys
    ]


def size_problems(height: int | None, width: int | None, num_frames: int, variant: Variant) -> list[Problem]:
    """Sides and numbers of frames that the model cannot take."""
    problems = []
    factor, step = variant.target.size_factor, variant.target.frame_step
    for side, value in (("height", height), ("width", width)):
        if value is not None and value % factor:
            nearest = max(factor, value // factor * factor)
            problems.append(
                Problem(
                    f"`{side}` {value} is not a multiple of {factor}, which {variant.title} requires",
                    f"pass `--{side} {nearest}`",
                    wrong_use=True,
                )
            )
    if variant.target.kind == "video" and (num_frames - 1) % step:
        nearest = max(0, num_frames - 1) // step * step + 1
        problems.append(
            Problem(
                f"`num_frames` {num_frames} is not of the form {step}n + 1, which {variant.title} requires",
                f"pass `--num_frames {nearest}` or `{nearest + step}`",
                wrong_use=True,
            )
        )
    return problems


def _input_problems(parameters: Parameters, variant: Variant) -> list[Problem]:
    """Extra inputs that the model does not take, those it cannot do without, and parameters that need one to matter."""
    problems = []
    of_objective = TASKS[parameters.task].columns
    for name in parameters.extra_inputs:
        if name not in (*variant.accepted_inputs, *of_objective):
            near = suggest(name, set(variant.accepted_inputs) - set(parameters.extra_inputs))
            known = f"it takes {', '.join(variant.accepted_inputs)}" if variant.accepted_inputs else "remove it"
            hint = f"did you mean `{near}`?" if near else known
            problems.append(
                Problem(f"`extra_inputs` names `{name}`, which {variant.title} does not support", hint, wrong_use=True)
            )
    problems += [
        Problem(
            f"`extra_inputs` lacks `{name}`, which {variant.title} requires",
            f"pass `--extra_inputs {','.join((*parameters.extra_inputs, name))}`",
            wrong_use=True,
        )
        for name in variant.required_inputs
        if name not in parameters.extra_inputs
    ]
    return problems
