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
from diffsynth_core.conversion.add_plan import SumPlan, output_of, plan_sum
from diffsynth_core.conversion.bases import open_base
from diffsynth_core.conversion.lora_inputs import LoraSummary, WeightedFile
from diffsynth_core.conversion.merge_plan import MergePlan, outputs_of, plan_merge
from diffsynth_core.conversion.plans import FilePlan
from diffsynth_core.conversion.provenance import InputHashes
from diffsynth_core.errors import list_names, raise_if_any
from diffsynth_core.files import model_base_path
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.weight_writer import output_problems

if TYPE_CHECKING:
    from diffsynth_core.adapters.merge import RelativeError

HEADINGS = ("LoRA", "weight", "modules", "rank", "scale", "alpha", "skipped")
WORST_SHOWN = 3
"""Maximum number of modules listed as losing most."""


@dataclass(frozen=True)
class Manner:
    """Options of a merge."""

    dtype: str | None
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
    losses: tuple[RelativeError, ...] = ()
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
        losses = result.losses
        facts["lost"] = result.loss.share
    changed = f"{pluralize(len(plan.changed), 'tensor')} of {len(base.weights.tensors)} changed"
    lines = [f"{base.weights.origin}: {base.title}, {changed}"]
    _tell(lines, _summaries(plan), losses, written, facts, how)


def into_one(files: Sequence[WeightedFile], output: Path, rank: int | None, family: str | None, how: Manner) -> None:
    """Combine LoRAs into one, or report what that would do.

    Raises:
        DiffSynthError: if something does not fit or cannot be written; no files are left then.
    """
    plan = plan_sum(files, output, rank, how.dtype, how.allow_unmatched, family)
    ranks = sorted({module.rank for module in plan.modules})
    facts: dict[str, Any] = {"modules": len(plan.modules), "ranks": ranks}
    written = FilePlan((output_of(plan),), plan.inputs)
    lines = [f"{pluralize(len(plan.modules), 'module')} of rank {_span(ranks)}"]
    if plan.dialect:
        facts["to"] = plan.dialect
        lines.append(f"the files have several key formats; written in the format `{plan.dialect}`")
    raise_if_any(output_problems(written.outputs, plan.inputs, how.overwrite))
    if not how.dry_run:
        hashes = InputHashes(plan.inputs)
        from diffsynth_core.conversion.add_loras import add_loras

        with handle_sigint():
            result = add_loras(plan, hashes, ConsoleReporter(), how.overwrite)
        if rank is not None:
            shares = {name: loss.share for name, loss in result.losses.items()}
            facts |= {"lost": result.loss.share, "lost_by_module": shares}
            lines += _lost_to_rank(rank, result.loss.share, shares)
    _tell(lines, plan.summaries, (), written, facts, how)


def _lost_to_rank(rank: int, share: float, shares: Mapping[str, float]) -> list[str]:
    """The loss of rank reduction, in total and for the worst modules."""
    worst = sorted(shares, key=lambda name: -shares[name])[:WORST_SHOWN]
    shown = ", ".join(f"`{name}` {shares[name]:.3%}" for name in worst)
    return [f"rank {rank} loses {share:.3%} of the change (||D - D'|| / ||D||); most: {shown}"]


def _summaries(plan: "MergePlan | SumPlan") -> tuple[LoraSummary, ...]:
    return plan.summaries if isinstance(plan, SumPlan) else tuple(lora.summary for lora in plan.loras)


def _tell(
    lines: Sequence[str],
    summaries: Sequence[LoraSummary],
    losses: Sequence["RelativeError"],
    written: FilePlan,
    facts: Mapping[str, Any],
    how: Manner,
) -> None:
    """Print the result to stdout; skipped tensors also as a note."""
    reporter = ConsoleReporter()
    for summary in summaries:
        if summary.differences:
            reporter.info(
                f"`{summary.path}`: full-weight differences are added to {pluralize(summary.differences, 'tensor')}"
            )
        if summary.unmatched:
            left_out = f"{pluralize(len(summary.unmatched), 'key')} skipped: {list_names(sorted(summary.unmatched))}"
            reporter.warn(f"`{summary.path}`: {left_out}")
    if how.output_format is PlanFormat.JSON:
        loras = [_described(summary, loss) for summary, loss in _with_losses(summaries, losses)]
        content = {"written": not how.dry_run, **facts, "loras": loras, "outputs": _outputs(written)}
        echo(json.dumps(content, indent=2))
        return
    for line in (*lines, "", *_lora_table(summaries, losses), ""):
        echo(printable(line))
    echo(files_table(written))
    reporter.info(total_line(written, how.dry_run))


def _outputs(written: FilePlan) -> list[dict[str, Any]]:
    """The files, without the metadata, in which a plan has no hashes yet."""
    return [{name: fact for name, fact in file.items() if name != "metadata"} for file in describe_files(written)]


def _with_losses(
    summaries: Sequence[LoraSummary], losses: Sequence["RelativeError"]
) -> list[tuple[LoraSummary, "RelativeError | None"]]:
    return [(summary, losses[place] if losses else None) for place, summary in enumerate(summaries)]


def _described(summary: LoraSummary, loss: "RelativeError | None") -> dict[str, Any]:
    return {
        "path": str(summary.path),
        "weight": summary.weight,
        "matched": summary.matched,
        "unmatched": list(summary.unmatched),
        "ranks": list(summary.ranks),
        "scales": list(summary.scales),
        "alpha": summary.alpha,
        **({"differences": summary.differences} if summary.differences else {}),
        **({"lost": loss.share} if loss else {}),
    }


def _lora_table(summaries: Sequence[LoraSummary], losses: Sequence["RelativeError"]) -> list[str]:
    """One line per LoRA, below a header."""
    rows = [(*HEADINGS, *(["rounding error"] if losses else []))]
    for summary, loss in _with_losses(summaries, losses):
        facts = (
            f"{summary.weight:g}",
            str(summary.matched),
            _span(summary.ranks),
            _span(summary.scales),
            summary.alpha,
        )
        left_out = pluralize(len(summary.unmatched), "key")
        rows.append((str(summary.path), *facts, left_out, *([f"{loss.share:.1%}"] if loss else [])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _span(numbers: Sequence[float]) -> str:
    """One number, or the minimum and maximum; a dash if there are none."""
    if not numbers:
        return "-"
    return f"{numbers[0]:g}" if len(numbers) == 1 else f"{numbers[0]:g} to {numbers[-1]:g}"
