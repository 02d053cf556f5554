"""Carrying out `merge-lora` and reporting the result, as tables or as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth_cli.console import ConsoleReporter
from diffsynth_cli.file_plans import PlanFormat, describe_files, files_table, total_line
from diffsynth_cli.printing import echo, printable
from diffsynth_cli.stopping import handle_sigint
from diffsynth_core.config.choices import WeightDtype
from diffsynth_core.conversion.add_plan import output_of, plan_addition
from diffsynth_core.conversion.bases import open_base
from diffsynth_core.conversion.lora_inputs import WeightedLora
from diffsynth_core.conversion.merge_plan import outputs_of, plan_merge
from diffsynth_core.conversion.plans import FilePlan
from diffsynth_core.conversion.provenance import InputHashes
from diffsynth_core.errors import list_names, raise_if_any
from diffsynth_core.files import model_base_path
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.weight_writer import output_problems
from diffsynth_core.weights.weighted_files import WeightedFile

if TYPE_CHECKING:
    from diffsynth_core.adapters.merge import RelativeError

HEADINGS = ("LoRA", "weight", "modules", "rank", "scale", "alpha", "skipped")
"""Headings of the table of LoRAs."""
WORST_SHOWN = 3
"""Maximum number of modules listed as losing most."""
SHOWN_LOSS = 0.5e-5
"""The least loss of a listed module: less is 0.000%."""


@dataclass(frozen=True)
class Manner:
    """Options of a merge."""

    dtype: WeightDtype | None
    allow_unmatched: bool
    overwrite: bool
    dry_run: bool
    output_format: PlanFormat


def into_base(
    base_text: str, files: Sequence[WeightedFile], output: Path, max_shard_bytes: int | None, how: Manner
) -> None:
    """Merge LoRAs into a base, or report what that would do.

    Raises:
        DiffSynthError: if something does not fit or cannot be written; no files are left then.
    """
    base = open_base(base_text, model_base_path())
    plan = plan_merge(base, files, output, how.dtype, max_shard_bytes, how.allow_unmatched)
    errors: tuple[RelativeError, ...] = ()
    facts: dict[str, Any] = {
        "base": {"path": base.weights.origin, "family": base.facts.name, "component": base.component.name},
        "changed": len(plan.changed),
    }
    written = FilePlan(tuple(outputs_of(plan, lambda name: tuple)), plan.inputs)
    raise_if_any(output_problems(written.outputs, plan.inputs, how.overwrite))
    if not how.dry_run:
        hashes = InputHashes(plan.hashed)  # takes about as long as importing torch
        from diffsynth_core.conversion.merging import merge

        with handle_sigint():
            result = merge(plan, hashes, ConsoleReporter(), how.overwrite)
        errors = result.errors
        facts["lost"] = result.error.value
    changed = f"{pluralize(len(plan.changed), 'tensor')} of {len(base.weights.tensors)} changed"
    lines = [f"{base.weights.origin}: {base.title}, {changed}"]
    _report(lines, plan.loras, errors, written, facts, how)


def into_one(files: Sequence[WeightedFile], output: Path, rank: int | None, family: str | None, how: Manner) -> None:
    """Combine LoRAs into one, or report what that would do.

    Raises:
        DiffSynthError: if something does not fit or cannot be written; no files are left then.
    """
    plan = plan_addition(files, output, rank, how.dtype, how.allow_unmatched, family)
    ranks = sorted({module.rank for module in plan.modules})
    facts: dict[str, Any] = {"modules": len(plan.modules), "ranks": ranks}
    written = FilePlan((output_of(plan),), plan.inputs)
    lines = [f"{pluralize(len(plan.modules), 'module')} of rank {_span(ranks)}"]
    if plan.lora_format:
        facts["to"] = plan.lora_format
        lines.append(f"the files have several key formats; written in the format `{plan.lora_format}`")
    raise_if_any(output_problems(written.outputs, plan.inputs, how.overwrite))
    if not how.dry_run:
        hashes = InputHashes(plan.inputs)
        from diffsynth_core.conversion.add_loras import add_loras

        with handle_sigint():
            result = add_loras(plan, hashes, ConsoleReporter(), how.overwrite)
        if rank is not None:
            shares = {name: error.value for name, error in result.errors.items()}
            facts |= {"lost": result.error.value, "lost_by_module": shares}
            lines += _lost_to_rank(rank, result.error.value, shares)
    _report(lines, plan.loras, (), written, facts, how)


def _lost_to_rank(rank: int, share: float, shares: Mapping[str, float]) -> list[str]:
    """The loss of rank reduction, in total and for the worst modules."""
    line = f"rank {rank} loses {share:.3%} of the change (||D - D'|| / ||D||)"
    worst = sorted(shares, key=lambda name: -shares[name])[:WORST_SHOWN]
    shown = [f"`{name}` {shares[name]:.3%}" for name in worst if shares[name] >= SHOWN_LOSS]
    return [f"{line}; most: {', '.join(shown)}" if shown else line]


def _report(
    lines: Sequence[str],
    loras: Sequence[WeightedLora],
    errors: Sequence["RelativeError"],
    written: FilePlan,
    facts: Mapping[str, Any],
    how: Manner,
) -> None:
    """Print all of it on stdout; skipped keys also as a warning. `errors`: of rounding, for each LoRA, or empty."""
    reporter = ConsoleReporter()
    for one in loras:
        if one.lora.tensors:
            count = pluralize(len(one.lora.tensors), "tensor")
            reporter.info(f"`{one.lora.path}`: full-weight differences are added to {count}")
        if one.lora.unmatched:
            skipped = f"{pluralize(len(one.lora.unmatched), 'key')} skipped: {list_names(sorted(one.lora.unmatched))}"
            reporter.warn(f"`{one.lora.path}`: {skipped}")
    if how.output_format is PlanFormat.JSON:
        described = [_described(one, error) for one, error in _with_errors(loras, errors)]
        content = {"written": not how.dry_run, **facts, "loras": described, "outputs": _outputs(written)}
        echo(json.dumps(content, indent=2))
        return
    for line in (*lines, "", *_lora_table(loras, errors), ""):
        echo(printable(line))
    echo(files_table(written))
    reporter.info(total_line(written, how.dry_run))


def _outputs(written: FilePlan) -> list[dict[str, Any]]:
    """The files, without the metadata, in which a plan has no hashes yet."""
    return [{name: fact for name, fact in file.items() if name != "metadata"} for file in describe_files(written)]


def _with_errors(
    loras: Sequence[WeightedLora], errors: Sequence["RelativeError"]
) -> list[tuple[WeightedLora, "RelativeError | None"]]:
    return [(one, errors[place] if errors else None) for place, one in enumerate(loras)]


def _described(one: WeightedLora, error: "RelativeError | None") -> dict[str, Any]:
    return {
        "path": str(one.lora.path),
        "weight": one.weight,
        "matched": len(one.lora.pairs),
        "unmatched": list(one.lora.unmatched),
        "ranks": one.lora.stored_ranks,
        "scales": one.lora.scales,
        "alpha": one.lora.alpha_source,
        **({"differences": len(one.lora.tensors)} if one.lora.tensors else {}),
        **({"lost": error.value} if error else {}),
    }


def _lora_table(loras: Sequence[WeightedLora], errors: Sequence["RelativeError"]) -> list[str]:
    """A line for each LoRA, below their headings."""
    rows = [(*HEADINGS, *(["rounding error"] if errors else []))]
    for one, error in _with_errors(loras, errors):
        facts = (
            str(one.lora.path),
            f"{one.weight:g}",
            str(len(one.lora.pairs)),
            _span(one.lora.stored_ranks),
            _span(one.lora.scales),
            one.lora.alpha_source,
            pluralize(len(one.lora.unmatched), "key"),
        )
        rows.append((*facts, *([f"{error.value:.1%}"] if error else [])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _span(numbers: Sequence[float]) -> str:
    """One number, or the minimum and maximum; a dash if there are none."""
    if not numbers:
        return "-"
    return f"{numbers[0]:g}" if len(numbers) == 1 else f"{numbers[0]:g} to {numbers[-1]:g}"
