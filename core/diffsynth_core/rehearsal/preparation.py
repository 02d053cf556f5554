"""The parameters of a rehearsal: tiny models, small sizes, and synthetic media where no dataset is named."""

import math
from dataclasses import replace
from pathlib import Path

from diffsynth_core.config.parameters import SETTINGS, Parameters
from diffsynth_core.config.resolve import Resolved
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.data.synthetic_images import draw_images
from diffsynth_core.data.synthetic_videos import draw_clips
from diffsynth_core.errors import Problem, collect_problems, list_names, report
from diffsynth_core.files import default_cache_path
from diffsynth_core.models.registry import unknown_family
from diffsynth_core.models.spec import Variant
from diffsynth_core.planning.model.file_assignment import refused_models
from diffsynth_core.planning.model.replaced import drop_replaced_entries
from diffsynth_core.progress import Reporter
from diffsynth_core.rehearsal.tiny_models import WEIGHTS_VERSION, family_of, named_models, swap_models, variant_of

REHEARSAL_FACTOR = 32
"""Divisor of the sides; every model accepts multiples of it."""
SYNTHETIC_REFERENCES = 2
"""Maximum number of reference images in a synthetic row."""


def prepare(resolved: Resolved, reporter: Reporter) -> tuple[Resolved, Path]:
    """Return the parameters of the rehearsal and the folder of its models; writes tiny weights and synthetic media."""
    resolved = drop_replaced_entries(resolved)
    parameters = resolved.parameters
    folder = rehearsal_folder(parameters)
    with collect_problems() as problems:
        named = named_models(parameters)
        facts = family_of(resolved, named)
        if facts is None and resolved.family:
            unknown = unknown_family(resolved.family, parameters.config)
            return replace(resolved, problems=(*resolved.problems, unknown), incomplete=True), folder
        if facts is None or resolved.incomplete or refused_models(parameters.model_id_with_origin_paths):
            return resolved, folder  # planning reports why
        base = models_folder(parameters, facts.name)
        changes = swap_models(parameters, named, facts, base)
        columns = TASKS[parameters.task].columns
        if columns and not resolved.origin("dataset_base_path").is_given:
            what = f"the synthetic dataset of a rehearsal has no columns {', '.join(columns)}, which `{parameters.task}` requires"
            report(Problem(what, "pass a dataset that has them as `--dataset_base_path`", wrong_use=True))
        incomplete = bool(problems)
        about_files = [setting for setting in SETTINGS.values() if setting.rehearsal == "removed"]
        given = [
            setting.name for setting in about_files if setting.type_name == "path" and getattr(parameters, setting.name)
        ]
        for name in given:
            what = f"`{name}` requires the real weights and cannot be rehearsed"
            report(Problem(what, "remove it for the rehearsal", wrong_use=True))
        if given:  # without a file, planning says that the others lack it
            changes |= {setting.name: None for setting in about_files}
    changes |= _without_other_places(parameters, reporter)
    if parameters.max_steps is None:
        changes["max_steps"] = SETTINGS["max_steps"].rehearsal_limit
    changes |= (
        _whole_samples(parameters, reporter)
        | _fewer_blocks(parameters, reporter)
        | _fewer_sampling_steps(resolved, reporter)
    )
    variant = variant_of(named, facts, parameters.extra_inputs)
    changes |= _reduced_size(resolved, variant, reporter)
    if not resolved.origin("dataset_base_path").is_given:
        changes["dataset_base_path"] = _draw(folder, variant)
    if resolved.origin("output_path").kind != "flag":
        changes["output_path"] = Path("rehearsals") / "next"
    return replace(
        resolved,
        parameters=parameters.model_copy(update=changes),
        problems=(*resolved.problems, *problems),
        incomplete=incomplete,
    ), base


def rehearsal_folder(parameters: Parameters) -> Path:
    """Return the folder of everything that rehearsals write besides their runs."""
    return (parameters.cache_path or default_cache_path()) / "rehearsal"


def models_folder(parameters: Parameters, family: str) -> Path:
    """Return the folder of the tiny models of a family."""
    return rehearsal_folder(parameters) / f"{family}-v{WEIGHTS_VERSION}"


def _draw(folder: Path, variant: Variant) -> Path:
    """Create a synthetic dataset of the target kind of a model, with reference images in the columns it reads."""
    if variant.target.kind == "video":
        return draw_clips(folder / "clips")
    shown = {
        shown.column: 0 if shown.aligned else min(SYNTHETIC_REFERENCES, shown.max_count or SYNTHETIC_REFERENCES)
        for shown in variant.conditions
    }
    name = "-".join(["images", *(f"{column}-{most}" for column, most in shown.items())])
    return draw_images(folder / name, shown)


def _without_other_places(parameters: Parameters, reporter: Reporter) -> dict[str, object]:
    """Return the defaults of parameters that a rehearsal does not use, and report those that are set."""
    unused = {setting.name: setting.default for setting in SETTINGS.values() if setting.rehearsal == "unused"}
    given = [name for name, default in unused.items() if getattr(parameters, name) != default]
    if given:
        reporter.info(f"The rehearsal does not use {list_names(given)}: what it writes stays in its folder")
    return unused


def _fewer_blocks(parameters: Parameters, reporter: Reporter) -> dict[str, object]:
    """Return as many blocks to swap as tiny models have, and report the change."""
    asked, limit = parameters.blocks_to_swap, SETTINGS["blocks_to_swap"].rehearsal_limit
    assert limit
    if asked != "auto" and asked <= limit:
        return {}
    reporter.info(f"The rehearsal swaps {limit} blocks (instead of {asked}): its models are tiny")
    return {"blocks_to_swap": limit}


def _whole_samples(parameters: Parameters, reporter: Reporter) -> dict[str, object]:
    """Return that the one process of a rehearsal computes each sample alone, and report the change."""
    if parameters.context_parallel == 1:
        return {}
    instead = f"`context_parallel` 1 (instead of {parameters.context_parallel})"
    reporter.info(f"The rehearsal computes each sample in one process: {instead}")
    return {"context_parallel": 1}


def _fewer_sampling_steps(resolved: Resolved, reporter: Reporter) -> dict[str, object]:
    """Return fewer sampling steps of previews, unless they are set on the command line, and report the change."""
    asked, limit = resolved.parameters.preview_steps, SETTINGS["preview_steps"].rehearsal_limit
    assert limit
    if resolved.parameters.preview_prompts is None or resolved.origin("preview_steps").kind == "flag":
        return {}
    if asked is not None and asked <= limit:
        return {}
    instead = f"`preview_steps` {limit} (instead of {asked or 'those of the model'})"
    reporter.info(f"The rehearsal draws in few steps: {instead}; pass the flag to use another number")
    return {"preview_steps": limit}


def _reduced_size(resolved: Resolved, variant: Variant, reporter: Reporter) -> dict[str, object]:
    """Return smaller sizes and areas for all that are not set on the command line, and report the changes."""
    now = resolved.parameters
    limits = {
        name: setting.rehearsal_limit
        for name, setting in SETTINGS.items()
        if setting.group == "size" and setting.rehearsal_limit and resolved.origin(name).kind != "flag"
        if variant.target.kind == "video" or not setting.for_video
    }
    changes: dict[str, object] = {}
    area, other = limits.pop("height", None), limits.pop("width", None)
    if now.height and now.width:
        if area and other:  # neither side is set on the command line
            scale = min(1.0, math.sqrt(area / (now.height * now.width)))
            for name, side in (("height", now.height), ("width", now.width)):
                changes[name] = max(REHEARSAL_FACTOR, int(side * scale) // REHEARSAL_FACTOR * REHEARSAL_FACTOR)
        if all(shown.aligned for shown in variant.conditions):  # nothing is scaled to an area
            limits.pop("max_pixels", None)
    changes |= {name: limit for name, limit in limits.items() if getattr(now, name) > limit}
    changes = {name: value for name, value in changes.items() if value != getattr(now, name)}
    if changes:
        said = ", ".join(f"`{name}` {value} (instead of {getattr(now, name)})" for name, value in changes.items())
        reporter.info(f"The rehearsal runs at a small size: {said}; pass the flag to use another")
    return changes
