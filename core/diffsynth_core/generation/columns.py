"""What varies in a grid, column by column: weights of a LoRA, or the checkpoints of a run. No torch."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.checkpoints.run_folder import RunRecord
from diffsynth_core.errors import DiffSynthError, Problem, report
from diffsynth_core.generation.request import GenerationRequest
from diffsynth_core.models.recognition import best_readings, read_lora_keys
from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.planning.drawing.jobs import AppliedLora
from diffsynth_core.planning.model.lora_files import read_lora_of, tensor_shapes
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.weights.headers import read_header
from diffsynth_core.weights.lora import Lora
from diffsynth_core.weights.weighted_files import WeightedFile, parse_weights

_Weights = tuple[Path, tuple[float, ...]]
"""A file with its weights, one for each column or one for all."""
WITHOUT = "without LoRA"
"""Label of a column whose LoRA has the weight 0."""
BEFORE = "before training"
"""Label of the model that a run started from."""


@dataclass(frozen=True)
class Column:
    """The files of the images in one column; without a grid there is one column.

    Attributes:
        checkpoint: full weights in place of those of a component.
        component: that of the LoRAs; None: recognized by their keys.
        second_loras: those of the second of two denoisers.
    """

    label: str = ""
    checkpoint: Path | None = None
    loras: tuple[WeightedFile, ...] = ()
    component: str | None = None
    second_loras: tuple[WeightedFile, ...] = ()


def find_columns(request: GenerationRequest, record: RunRecord | None) -> list[Column]:
    """Return the columns of a request, one without a grid. Reports problems."""
    given, second = list(_parse(request.loras)), list(_parse(request.second_loras))
    if record is not None and request.run is not None and not (given or request.loras or request.checkpoint):
        return _of_run(request.run, record, request.grid)
    for loras in (given, second):
        several = [path for path, weights in loras if len(weights) > 1]
        if several and not request.grid:
            what = f"`--lora` `{several[0]}` has several weights, which make the columns of a grid"
            report(Problem(what, "add `--grid`, or choose one weight", wrong_use=True))
        if len(several) > 1:
            what = f"`--lora` `{several[0]}` and `{several[1]}` both have several weights"
            report(Problem(what, "vary one LoRA at a time", wrong_use=True))
    count = max((len(weights) for _, weights in (*given, *second)), default=1)
    return [_column(given, second, number, request.checkpoint) for number in range(count)]


def _parse(texts: Sequence[str]) -> Iterator[tuple[Path, tuple[float, ...]]]:
    """Yield each LoRA with its weights; reports wrong weights, missing files, and files that are given twice."""
    known: set[Path] = set()
    for text in texts:
        try:
            path, weights = parse_weights(text)
        except DiffSynthError as error:
            report(*error.problems)
            continue
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            report(Problem(f"`--lora` `{path}` {what}", "pass a LoRA file", wrong_use=True))
            continue
        if path.resolve() in known:
            report(Problem(f"`--lora` `{path}` is given twice", "give it once, with the sum of the weights", True))
            continue
        known.add(path.resolve())
        yield path, weights


def _column(given: Sequence[_Weights], second: Sequence[_Weights], number: int, checkpoint: Path | None) -> Column:
    loras, others = (
        tuple(WeightedFile(path, weights[min(number, len(weights) - 1)]) for path, weights in some)
        for some in (given, second)
    )
    named = zip((*loras, *others), (*given, *second), strict=True)
    varying = [lora for lora, (_, weights) in named if len(weights) > 1] or [*loras, *others]
    label = ", ".join(dict.fromkeys(map(_label, varying)))
    return Column(label, checkpoint, loras, second_loras=others)


def _label(lora: WeightedFile) -> str:
    return f"{lora.path.stem}: {lora.weight:g}" if lora.weight else WITHOUT


def _of_run(folder: Path, record: RunRecord, grid: bool) -> list[Column]:
    """Return the columns of a run: its last checkpoint or, for a grid, the base and every checkpoint."""
    files = [folder / entry.file for entry in record.checkpoints if (folder / entry.file).is_file()]
    if not files:
        hint = "wait for its first checkpoint, or pass one with `--lora` or `--checkpoint`"
        report(Problem(f"`--run` `{folder}` has no checkpoint", hint))
        return [Column()]
    component = record.parameters.get("lora_base_model")
    full = record.parameters.get("trainable_models") or []
    if component and full:
        what = f"the checkpoints of `{folder}` hold a LoRA of {component} and full weights of {', '.join(full)}"
        how = f"`diffsynth split-ckpt {shlex.quote(str(files[-1]))} --output_path DIR`"
        report(Problem(what, f"split one with {how}, and pass the parts with `--lora` and `--checkpoint`"))
        return [Column()]
    if component:
        columns = [Column(file.stem, None, (WeightedFile(file),), component) for file in files]
        return [Column(WITHOUT, None, (), component), *columns] if grid else columns[-1:]
    columns = [Column(file.stem, file) for file in files]
    return [Column(BEFORE), *columns] if grid else columns[-1:]


class LoraReader:
    """Reads LoRA files for a model, each once. Reports problems."""

    def __init__(self, found: ModelPlan) -> None:
        self._found = found
        self._known: dict[tuple[Path, str | None], tuple[Lora, str] | None] = {}

    def applied(self, column: Column) -> tuple[AppliedLora, ...]:
        """Return the LoRAs of a column; those that cannot be used are left out and reported."""
        second = self._found.facts.second_denoiser
        files = [(lora, column.component) for lora in column.loras] + [(lora, second) for lora in column.second_loras]
        found = [(self._read(lora.path, component), lora.weight) for lora, component in files]
        return tuple(
            AppliedLora(lora=read[0], component=read[1], weight=weight, shapes=tensor_shapes(read[1], self._found))
            for read, weight in found
            if read
        )

    def _read(self, path: Path, component: str | None) -> tuple[Lora, str] | None:
        if (path, component) not in self._known:
            self._known[path, component] = self._match(path, component)
        return self._known[path, component]

    def _match(self, path: Path, component: str | None) -> tuple[Lora, str] | None:
        """Return a LoRA and the component that it is for: the denoiser, or one that runs in every step beside it."""
        facts = self._found.facts
        if component is not None and component == facts.second_denoiser and component not in self._found.components:
            what = f"`{path}` is for the second of two transformers, but {self._found.variant.title} is drawn with one"
            report(Problem(what, "pass it with `--lora`", wrong_use=True))
            return None
        drawing = [
            name
            for name in (facts.denoiser, *self._found.variant.step_components, *([component] if component else []))
            if self._found.shapes.get(name)
        ]
        if component and component not in drawing:
            hint = f"only LoRAs of {' and '.join(drawing)} can be drawn with"
            report(Problem(f"`{path}` is a LoRA of {component}", hint))
            return None
        problems: list[Problem] = []
        for name in [component] if component else drawing:
            try:
                return read_lora_of(path, name, self._found), name
            except DiffSynthError as error:
                problems = problems or list(error.problems)
        report(*([other] if (other := _other_family(path, self._found)) else problems))
        return None


def _other_family(path: Path, found: ModelPlan) -> Problem | None:
    """Return the problem of a LoRA all of whose keys belong to a model of another family; None if it is not one."""
    try:
        tensors = read_header(path).tensors
    except DiffSynthError:
        return None
    readings = read_lora_keys(tensors, list(FAMILIES.values()), None)
    best = best_readings(readings, tensors) if readings and tensors else []
    if not best or best[0].match.unmatched or any(one.facts is found.facts for one in best):
        return None
    what = (
        f"`{path}` is a LoRA of {' or '.join(one.facts.title for one in best)}, but the model is {found.variant.title}"
    )
    return Problem(what, "pass a LoRA of this model", wrong_use=True)
