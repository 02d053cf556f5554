"""The model card of a run, and a sheet of its previews: what others may see of it, without paths of this machine."""

import io
import math
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import yaml
from PIL import Image

from diffsynth_core.checkpoints.run_folder import METRICS, RunRecord, preview_folder, read_previews
from diffsynth_core.config.documents import format_value
from diffsynth_core.config.parameters import SETTINGS, as_plain
from diffsynth_core.json_files import read_json_lines
from diffsynth_core.planning.memory.trained_sizes import count_trained
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import format_count, pluralize

SHEET = "previews.jpg"
"""File of the sheet of previews in a repository."""
LOSS_STEPS = 50
"""The card states the mean loss of so many last steps."""
SHEET_COLUMNS, SHEET_ROWS, THUMBNAIL = 4, 4, 384
"""Previews in a row and in a column of the sheet at most, and the longest side of each in pixels."""
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+):", re.ASCII)
"""The repository that an entry of `model_id_with_origin_paths` begins with."""
_OF_THIS_MACHINE = ("path", "json list")
"""Types of parameters whose values are paths."""


def model_card(plan: RunPlan, record: RunRecord, folder: Path, with_previews: bool) -> str:
    """Return the model card of a run as Markdown with YAML before it.

    Args:
        folder: of the run, for its losses.
        with_previews: whether `previews.jpg` is beside the card.
    """
    title, name = plan.model.variant.title, plan.parameters.push_to_hub or ""
    head = yaml.safe_dump(_front_matter(plan), sort_keys=False, allow_unicode=True)
    lines = [
        f"---\n{head}---\n",
        f"# {name.partition('/')[2]}\n",
        f"{_what(plan)} for {title}, trained with diffsynth.\n",
    ]
    if with_previews:
        lines.append(f"![Previews of the run]({SHEET})\n")
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _figures(plan, record, folder)), ""]
    lines += ["## Checkpoints\n", "| file | step | epoch | validation loss |", "|---|---|---|---|"]
    for entry in record.checkpoints:
        best = " (best)" if entry.file == record.best_checkpoint else ""
        loss = "" if entry.validation_loss is None else f"{entry.validation_loss:.4f}{best}"
        lines.append(f"| {_code(entry.file)} | {entry.step} | {entry.epoch} | {loss} |")
        if entry.average:
            lines.append(f"| {_code(entry.average.file)} (averaged weights) | {entry.step} | {entry.epoch} | |")
    lines += ["", "## Parameters\n", "| | |", "|---|---|"]
    lines += [f"| {_code(name)} | {_code(value)} |" for name, value in shown_parameters(plan).items()]
    return "\n".join(lines) + "\n"


def _front_matter(plan: RunPlan) -> dict[str, Any]:
    """Return the metadata that both hubs index; the license is not known."""
    variant, lora = plan.model.variant, plan.training.lora_component is not None
    kind = "video" if variant.target.kind == "video" else "image"
    found: dict[str, Any] = {}
    if base := _base_models(plan):
        found = {"base_model": base, "base_model_relation": "adapter" if lora else "finetune"}
    return {
        **found,
        "library_name": "diffusers",
        "pipeline_tag": f"image-to-{kind}" if variant.conditions else f"text-to-{kind}",
        "tags": ["diffsynth", plan.model.facts.name, *(["lora"] if lora else [])],
    }


def _base_models(plan: RunPlan) -> list[str]:
    """Return the repositories of the components that are trained, as far as the parameters name them."""
    training = plan.training
    trained = {*training.full, *training.parts, *([training.lora_component] if training.lora_component else [])}
    origins = [plan.model.components[name].origin for name in sorted(trained) if name in plan.model.components]
    named = [
        entry for entry in plan.parameters.model_id_with_origin_paths if any(entry in origin for origin in origins)
    ]
    return list(dict.fromkeys(match[1] for entry in named if (match := _REPOSITORY.match(entry))))


def _what(plan: RunPlan) -> str:
    training = plan.training
    lora = f"LoRA of rank {plan.parameters.lora_rank} on {training.lora_component}" if training.lora_component else ""
    whole = " and ".join(sorted({*training.full, *training.parts}))
    return " and ".join(part for part in (f"Weights of {whole}" if whole else "", lora) if part)


def _figures(plan: RunPlan, record: RunRecord, folder: Path) -> Iterator[tuple[str, str]]:
    newest = record.checkpoints[-1]
    yield "steps", f"{newest.step} of {record.total_steps}"
    losses = [line.get("loss") for line in read_json_lines(folder / METRICS)]
    last = [loss for loss in losses if isinstance(loss, int | float)][-LOSS_STEPS:]
    if last:
        yield "loss", f"{math.fsum(last) / len(last):.4f} (mean of {pluralize(len(last), 'step')})"
    if newest.validation_loss is not None:
        yield "validation loss", f"{newest.validation_loss:.4f}"
    yield "training samples", str(len(plan.data.samples.samples) - len(plan.data.held_out))
    yield "trained parameters", format_count(count_trained(plan))
    yield "precision", plan.machine.mixed_precision
    yield "diffsynth", version("diffsynth-cli")


def shown_parameters(plan: RunPlan) -> dict[str, str]:
    """Return the parameters that change numbers and differ from their defaults, without paths of this machine.

    Parameters that are paths are left out. Where a path is only one way to give a value, the name of a file is kept; of
    a folder nothing, because its name may be that of a user.
    """
    found = {}
    plain = as_plain(plan.parameters)
    for name, setting in SETTINGS.items():
        value = getattr(plan.parameters, name)
        if setting.changes != "numbers" or value in (None, setting.default_of(plan.model.facts.name)):
            continue
        if setting.type_name in _OF_THIS_MACHINE:
            continue
        items = value if isinstance(value, tuple) else (value,) if isinstance(value, str) else ()
        words = ", ".join(filter(None, map(_without_path, map(str, items)))) if items else format_value(plain[name])
        if words:
            found[name] = words
    return found


def _without_path(text: str) -> str:
    """Return a value of which nothing remains but a file's name if it is a path; entries of a hub stay."""
    parts = [part for part in re.split(r"[/\\]", text) if part]
    if len(parts) < 2 or _REPOSITORY.match(text):
        return text.strip("/\\~")
    return parts[-1] if PurePath(parts[-1]).suffix else ""


def _code(text: str) -> str:
    """Return a text as code in a cell of a table."""
    plain = re.sub(r"[`|\x00-\x1f]", " ", text).strip()
    return f"`{plain}`" if plain else ""


def preview_sheet(folder: Path) -> bytes | None:
    """Return the latest images in `samples/` of a run side by side, as a JPEG without metadata; None without any."""
    for step, listed in reversed(read_previews(folder).items()):
        names = [image.file for image in listed.images]
        paths = [preview_folder(folder, step) / name for name in names if PurePath(name).name == name]
        images = [path for path in paths if path.suffix == ".png" and path.exists()]
        if images:
            return _side_by_side(images[: SHEET_COLUMNS * SHEET_ROWS])
    return None


def _side_by_side(paths: list[Path]) -> bytes:
    images = []
    for path in paths:
        with Image.open(path) as opened:
            opened.thumbnail((THUMBNAIL, THUMBNAIL))
            images.append(opened.convert("RGB"))
    columns = min(SHEET_COLUMNS, len(images))
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * width, number // columns * height))
    stream = io.BytesIO()
    sheet.save(stream, "JPEG", quality=90)
    return stream.getvalue()
