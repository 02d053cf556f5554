"""Rehearsal: run a recipe with tiny random weights before renting a GPU.

Each component is replaced with a tiny one of the same architecture, written to disk in the real file layout and read
with the same code: sources, loaders, key maps. Nothing else in the run differs.
"""

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffsynth_core.checkpoints.run_folder import read_record
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.resolve import Resolved
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.data.synthetic_images import draw_images
from diffsynth_core.data.synthetic_videos import draw_clips
from diffsynth_core.errors import DiffSynthError, Problem, list_names
from diffsynth_core.files import default_cache_path, make_numbered_folder
from diffsynth_core.hub.model_files import expand_local, locate, split_entry
from diffsynth_core.models.bases import shapes_in
from diffsynth_core.models.loading import module_shapes
from diffsynth_core.models.registry import (
    FAMILIES,
    component_at,
    family_of_model,
    load_family,
    recognise,
    recognise_family,
    unknown_family,
)
from diffsynth_core.models.spec import ComponentFacts, FamilyFacts, Variant
from diffsynth_core.planning.dataset import DatasetCheck, no_check
from diffsynth_core.planning.encodings import plan_encodings
from diffsynth_core.planning.output import REPEAT_REHEARSAL
from diffsynth_core.planning.plan import Plan, make_plan
from diffsynth_core.planning.recognition import FoundPart, read_file_set, refused_models
from diffsynth_core.planning.replaced import drop_replaced_entries
from diffsynth_core.progress import Reporter
from diffsynth_core.training.checkpointing import removed_prefix
from diffsynth_core.training.loop import RunResult, train
from diffsynth_core.training.stop import StopRequest
from diffsynth_core.weights.headers import read_headers
from diffsynth_core.weights.lora_files import check_lora_file

REHEARSAL_STEPS = 8
"""Number of steps, unless `max_steps` is set."""
REHEARSAL_PIXELS = 128 * 160
"""Maximum area, to which fixed sizes are scaled down."""
REHEARSAL_FACTOR = 32
"""Divisor of the sides; every model accepts multiples of it."""
REHEARSAL_FRAMES = 9
"""Maximum number of frames."""
SYNTHETIC_REFERENCES = 2
"""Maximum number of reference images in a synthetic row."""
REAL_LORAS = {"lora_checkpoint": ("lora_checkpoint",), "preset_lora_path": ("preset_lora_path", "preset_lora_model")}
"""Parameters with LoRA files for the real weights -> parameters that are removed with them."""
WEIGHTS_VERSION = 5
"""Incremented when the tiny weights change, so that older ones are not reused."""


@dataclass(frozen=True)
class Rehearsal:
    """The run, what it proved, and the kind of synthetic media it trained on, if any: images, videos."""

    result: RunResult
    proofs: tuple[str, ...]
    synthetic_media: str | None

    @property
    def checkpoint(self) -> Path:
        """Path of the last checkpoint."""
        return self.result.folder / self.result.record.checkpoints[-1].file


def rehearse(
    resolved: Resolved,
    reporter: Reporter,
    stop: StopRequest,
    announce: Callable[[Plan], None],
    check: DatasetCheck = no_check,
) -> Rehearsal:
    """Run with tiny weights: half of the steps, a stop, a resume, the other half; then verify the saved files.

    Args:
        announce: called with the plan before it is executed.
        check: checks the dataset before it is read.

    Raises:
        FaultsFound: as in planning.
        DiffSynthError: if a check fails.
    """
    prepared, base = prepare(resolved, reporter)
    steps = prepared.parameters.max_steps or REHEARSAL_STEPS
    plan = _settle_output(make_plan(prepared, reporter, base=base, check=check), resolved)
    announce(plan)
    half = min(steps, plan.steps.total_steps) // 2
    proofs = [
        f"loaded {len(plan.components)} components with tiny weights from the real file layout: {', '.join(plan.components)}"
    ]
    if half:
        train(plan, reporter, stop, stop_after=half)
    resuming = plan.parameters.model_copy(update={"resume": "auto"})
    resumed = make_plan(replace(prepared, parameters=resuming), reporter, base=base)
    if half:
        if resumed.first_step != half:
            raise DiffSynthError(
                f"the rehearsal stopped after step {half}, but would resume after step {resumed.first_step}"
            )
        if plan_encodings(resumed, reporter).components_to_load:
            raise DiffSynthError("the resumed run would encode samples that are already cached")
        proofs.append(f"stopped after step {half}, resumed, and finished at step {resumed.steps.total_steps}")
        proofs.append("the resumed run read all encodings from the cache and loaded no encoder")
    result = train(resumed, reporter, stop)
    proofs += _prove_checkpoint(resumed, result)
    synthetic_media = None if resolved.given("dataset_base_path") else f"{plan.variant.target.kind}s"
    return Rehearsal(result, tuple(proofs), synthetic_media)


def how_to_repeat(resolved: Resolved) -> str:
    """Return the hint after an interrupted rehearsal: a folder set with `--output_path` may contain its first steps."""
    folder = resolved.parameters.output_path
    if _is_flag(resolved, "output_path") and read_record(folder):
        return REPEAT_REHEARSAL.format(folder=folder)
    return "rerun the command"


def prepare(resolved: Resolved, reporter: Reporter) -> tuple[Resolved, Path]:
    """Return the parameters of the rehearsal and the folder of its models; writes tiny weights and synthetic media."""
    resolved = drop_replaced_entries(resolved)
    parameters = resolved.parameters
    folder = (parameters.cache_path or default_cache_path()) / "rehearsal"
    problems: list[Problem] = []
    named = _named_models(parameters, problems)
    facts = _family_of(resolved, named)
    if facts is None and resolved.family:
        return replace(
            resolved, problems=(*resolved.problems, unknown_family(resolved.family)), incomplete=True
        ), folder
    if facts is None or resolved.incomplete or refused_models(parameters.model_id_with_origin_paths):
        return resolved, folder  # planning reports why
    base = folder / f"{facts.name}-v{WEIGHTS_VERSION}"
    changes = _swap_models(parameters, named, facts, base, problems)
    columns = TASKS[parameters.task].columns
    if columns and not resolved.given("dataset_base_path"):
        what = f"the synthetic dataset of a rehearsal has no columns {', '.join(columns)}, which `{parameters.task}` requires"
        problems.append(Problem(what, "pass a dataset that has them as `--dataset_base_path`", wrong_use=True))
    incomplete = bool(problems)
    for name in REAL_LORAS:
        if getattr(parameters, name):
            what = f"`{name}` requires the real weights and cannot be rehearsed"
            problems.append(Problem(what, "remove it for the rehearsal", wrong_use=True))
            changes |= dict.fromkeys(REAL_LORAS[name])
    if parameters.max_steps is None:
        changes["max_steps"] = REHEARSAL_STEPS
    variant = _variant_of(named, facts, parameters.extra_inputs)
    changes |= _reduced_size(resolved, variant, reporter)
    if not resolved.given("dataset_base_path"):
        changes["dataset_base_path"] = _draw(folder, variant)
    if not _is_flag(resolved, "output_path"):
        changes["output_path"] = Path("rehearsals") / "next"
    return replace(
        resolved,
        parameters=parameters.model_copy(update=changes),
        problems=(*resolved.problems, *problems),
        incomplete=incomplete,
    ), base


def _is_flag(resolved: Resolved, name: str) -> bool:
    """Return whether a parameter was set on the command line."""
    return resolved.origins.get(name, "") == f"`--{name}`"


def _draw(folder: Path, variant: Variant) -> Path:
    """Create a synthetic dataset of the target kind of a model, with reference images in the columns it reads."""
    if variant.target.kind == "video":
        return draw_clips(folder / "clips")
    shown = {
        shown.column: min(SYNTHETIC_REFERENCES, shown.most or SYNTHETIC_REFERENCES) if shown.size else 0
        for shown in variant.references
    }
    name = "-".join(["images", *(f"{column}-{most}" for column, most in shown.items())])
    return draw_images(folder / name, shown)


def _reduced_size(resolved: Resolved, variant: Variant, reporter: Reporter) -> dict[str, object]:
    """Return smaller sizes and areas for all that are not set on the command line, and report the changes."""
    now = resolved.parameters
    changes: dict[str, object] = {}
    if now.height and now.width and not (_is_flag(resolved, "height") or _is_flag(resolved, "width")):
        scale = min(1.0, math.sqrt(REHEARSAL_PIXELS / (now.height * now.width)))
        for name, side in (("height", now.height), ("width", now.width)):
            changes[name] = max(REHEARSAL_FACTOR, int(side * scale) // REHEARSAL_FACTOR * REHEARSAL_FACTOR)
    scaled = not (now.height and now.width) or any(shown.size for shown in variant.references)
    if scaled and now.max_pixels > REHEARSAL_PIXELS and not _is_flag(resolved, "max_pixels"):
        changes["max_pixels"] = REHEARSAL_PIXELS
    if variant.target.kind == "video" and now.num_frames > REHEARSAL_FRAMES and not _is_flag(resolved, "num_frames"):
        changes["num_frames"] = REHEARSAL_FRAMES
    if changes:
        said = ", ".join(f"`{name}` {value} (instead of {getattr(now, name)})" for name, value in changes.items())
        reporter.info(f"The rehearsal runs at a small size: {said}; pass the flag to use another")
    return changes


def _settle_output(plan: Plan, resolved: Resolved) -> Plan:
    """Return the plan with a new output folder, unless one is set on the command line."""
    if _is_flag(resolved, "output_path"):
        return plan
    name = resolved.parameters.recipe or plan.facts.name
    name += f"-{resolved.stage}" if resolved.stage else ""
    folder = make_numbered_folder(Path("rehearsals"), lambda number: f"{name}-{number}")
    return replace(plan, parameters=plan.parameters.model_copy(update={"output_path": folder}))


@dataclass(frozen=True)
class _Named:
    """A model in the parameters: an entry of a repository, or local files with their content.

    Attributes:
        calls: names that other parameters may use for it.
    """

    origin: str
    calls: tuple[str, ...]
    parts: tuple[FoundPart, ...] = ()


def _named_models(parameters: Parameters, problems: list[Problem]) -> list[_Named]:
    """Return the models in the parameters; adds problems of files that are missing or unreadable."""
    entries = parameters.model_id_with_origin_paths
    fetched = [entry for entry in entries if split_entry(entry) and not expand_local(entry)]
    own = [entry for entry in entries if entry not in fetched]
    file_sets, gone = locate(parameters.model_paths, own, Path())
    problems += gone
    named = [_Named(entry, (entry,)) for entry in fetched]
    for file_set in file_sets:
        try:
            named.append(_Named(file_set.origin, file_set.entries, tuple(read_file_set(file_set))))
        except DiffSynthError as error:
            problems += error.problems
    return named


def _family_of(resolved: Resolved, named: Sequence[_Named]) -> FamilyFacts | None:
    """Return the family of the recipe, or of the repositories, or of local files."""
    if resolved.family:
        return FAMILIES.get(resolved.family)
    for model in named:
        parts = None if model.parts else split_entry(model.origin)
        if parts and (facts := family_of_model(parts[0])):
            return facts
    known = (recognise_family(found.names) for model in named for found in model.parts)
    return next(filter(None, known), None)


def _swap_models(
    parameters: Parameters, named: Sequence[_Named], facts: FamilyFacts, base: Path, problems: list[Problem]
) -> dict[str, object]:
    """Return model parameters that name tiny components, which are written if they do not exist yet."""
    substitute = _variant_of(named, facts, parameters.extra_inputs).model_id
    swapped = [_swap_files(model, facts, substitute, base, problems) for model in named]
    entries_of = {call: entries for model, entries in zip(named, swapped, strict=True) for call in model.calls}
    float8 = [entry for call in parameters.fp8_models for entry in entries_of.get(call, (call,))]
    return {
        **dict.fromkeys(facts.tokenizers),
        "model_id_with_origin_paths": tuple(entry for entries in swapped for entry in entries),
        "model_paths": (),
        "fp8_models": tuple(dict.fromkeys(float8)),
        "offload_models": (),
    }


def _variant_of(named: Sequence[_Named], facts: FamilyFacts, inputs: tuple[str, ...]) -> Variant:
    """Return the variant of the denoiser: from the headers of local files, or from the name of the repository."""
    for model in named:
        for stored in model.parts:
            found = recognise(stored.names, facts)
            if found and found[0].name == facts.denoiser:
                return facts.variant({facts.denoiser: shapes_in(stored.part, found[1])}, inputs, model.origin)
        parts = None if model.parts else split_entry(model.origin)
        component = component_at(parts[1], facts, parts[0]) if parts else None
        if component and component.name == facts.denoiser:
            return facts.variant({}, inputs, model.origin)
    return facts.variant({}, inputs, "")


def _swap_files(
    model: _Named, facts: FamilyFacts, substitute: str, base: Path, problems: list[Problem]
) -> tuple[str, ...]:
    """Return the entries of tiny components for a model, written if they do not exist yet.

    Local files are replaced with those of `substitute`, a published model.
    """
    parts = None if model.parts else split_entry(model.origin)
    if parts:
        components = [component_at(parts[1], facts, parts[0])]
    else:
        recognised = [recognise(found.names, facts) for found in model.parts]
        components = [found[0] if found else None for found in recognised]
    entries = []
    for component in components:
        if component is None:
            problems.append(
                Problem(
                    f"`{model.origin}` is not a component of {facts.title} that can be rehearsed",
                    "specify the files as a recipe does",
                    wrong_use=True,
                )
            )
            return (model.origin,)
        source = parts or (f"local/{substitute.rpartition('/')[2]}", f"{_folder_of(component)}/model.safetensors")
        entries.append(_ensure_tiny(component, *source, facts, base))
    return tuple(entries)


def _ensure_tiny(component: ComponentFacts, model_id: str, pattern: str, facts: FamilyFacts, base: Path) -> str:
    """Return the entry of a tiny component, written if it does not exist yet."""
    marker = base / "written" / hashlib.sha256(f"{model_id}:{pattern}".encode()).hexdigest()
    if not marker.is_file():
        _write_tiny(base, component.name, model_id, pattern, facts)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return f"{model_id}:{pattern}"


def _folder_of(component: ComponentFacts) -> str:
    """Return a folder in which repositories keep the component."""
    return next(pattern.removesuffix("/*") for pattern in component.file_patterns if pattern.endswith("/*"))


def _write_tiny(base: Path, component: str, model_id: str, pattern: str, facts: FamilyFacts) -> None:
    """Write to a temporary folder, then move file by file: concurrent rehearsals only see complete files."""
    staging = make_numbered_folder(base, lambda number: f".writing-{number}")
    load_family(facts.name).write_tiny_weights(staging, component, model_id, pattern)
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            target = base / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    shutil.rmtree(staging)


def _prove_checkpoint(plan: Plan, result: RunResult) -> list[str]:
    """Read the last checkpoint and verify its keys and shapes; return one line per part."""
    path = result.folder / result.record.checkpoints[-1].file
    tensors = read_headers([path])
    proofs = []
    full: dict[str, tuple[int, ...]] = {}
    for component in (*plan.training.full, *plan.training.parts):
        files = plan.components[component]
        own = module_shapes(files)
        kept = plan.training.weights(component, files.layout, own)
        shapes = files.layout.checkpoint_shapes({name: own[name] for name in kept})
        weights = {f"pipe.{component}.{name}": shape for name, shape in shapes.items()}
        full |= {name.removeprefix(removed_prefix(plan.parameters)): shape for name, shape in weights.items()}
        proofs.append(f"all {len(weights)} tensors of {component} are in the checkpoint with the right shapes")
    wrong = [name for name, shape in full.items() if name not in tensors or tensors[name].shape != shape]
    if wrong:
        raise DiffSynthError(
            f"`{path}` is missing {len(wrong)} tensors, or has them with other shapes: {list_names(wrong)}"
        )
    lora = plan.training.lora_component
    if lora:
        files = plan.components[lora]
        shapes = files.layout.public_shapes(module_shapes(files))
        modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
        ranks = check_lora_file(path, modules, plan.facts.component(lora).lora_naming, besides=full)
        if ranks.keys() != set(plan.training.lora_modules):
            raise DiffSynthError(
                f"`{path}` contains a LoRA of {len(ranks)} modules, but {len(plan.training.lora_modules)} were trained"
            )
        keys = len(tensors) - len(full)
        proofs.append(f"read the LoRA back: each of its {keys} keys matches one of {len(ranks)} modules of {lora}")
    return proofs
