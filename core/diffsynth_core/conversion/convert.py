"""`convert-lora`: converts a LoRA file to the format of another program, with the same weight changes. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffsynth_core.config.choices import LoraFormat
from diffsynth_core.conversion.bases import open_base
from diffsynth_core.conversion.lora_inputs import open_lora_file
from diffsynth_core.conversion.lora_source import RecognizedLora, open_lora
from diffsynth_core.conversion.lora_tensors import WrittenLora, write_lora
from diffsynth_core.conversion.plans import FilePlan
from diffsynth_core.errors import DiffSynthError, FaultsFound, Problem, list_names
from diffsynth_core.models.registry import unread_note
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.headers import TensorHeader
from diffsynth_core.weights.lora_files import ADAPTER_SETTINGS, match_to_base
from diffsynth_core.weights.weight_sets import ENDING
from diffsynth_core.weights.weight_writer import OutputFile, aligned

NO_LONGER_TRUE = (
    *(ADAPTER_SETTINGS, "ss_network_dim", "ss_network_alpha"),
    *("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"),
)
"""Metadata about the original file: its keys, ranks and scales, or bytes."""


def plan_conversion(
    path: Path,
    target: LoraFormat,
    output: Path,
    models: Path,
    family: str | None = None,
    component: str | None = None,
    base: str | None = None,
    allow_unmatched: bool = False,
) -> FilePlan:
    """Plan the conversion of `path` to the format `target`.

    Args:
        models: folder below which `base` may be given as `model_id:glob`.
        base: weights against which all keys are checked, before and after; optional.

    Raises:
        DiffSynthError: see `open_lora_file`, `open_lora` and `open_base`; also if a key matches no module of the base.
    """
    if output.suffix != ENDING:
        problem = Problem(
            f"`{output}` does not end in `{ENDING}`", f"use a name that ends in `{ENDING}`", wrong_use=True
        )
        raise FaultsFound([problem])
    weights = open_lora_file(path)
    source = open_lora(weights, family, component, allow_unmatched)
    modules = source.lora.in_vocabulary(source.naming.vocabulary(target))
    written = tuple(write_lora(module, lora, target) for module, lora in modules.items())
    tensors = aligned(tensor for lora in written for tensor in lora.tensors)
    if base is not None:
        results = {tensor.name: TensorHeader(tensor.dtype, tensor.shape, output) for tensor in tensors}
        _check(source, base, models, {path: source.weights.tensors, output: results})
    file = OutputFile(output, tensors, _metadata(source, target))
    facts = _facts(source, written, target, base)
    return FilePlan((file,), source.weights.inputs, tuple(_notes(source, written, target, base)), facts)


def _check(source: RecognizedLora, text: str, models: Path, files: Mapping[Path, Mapping[str, TensorHeader]]) -> None:
    """Check a LoRA against its base, before and after the conversion."""
    base = open_base(text, models, "--check")
    expected = source.facts.component(source.facts.denoiser)
    if base.facts is not source.facts or base.component is not expected:
        raise DiffSynthError(
            f"`{text}` is {base.title}, but the LoRA is for {source.title}", "pass the base of this LoRA"
        )
    for path, tensors in files.items():
        match_to_base(path, tensors, base.shapes, source.naming, besides=source.lora.unmatched)


def _metadata(source: RecognizedLora, target: LoraFormat) -> dict[str, str]:
    """Return the metadata of the new file: that of the old one as far as it still applies, and what changed."""
    (kept,) = source.weights.metadata.values()
    return {
        **{key: text for key, text in kept.items() if key not in NO_LONGER_TRUE},
        "family": source.facts.name,
        "lora_component": source.naming.component,
        "lora_format": target,
        "removed_prefix": f"pipe.{source.naming.component}.",
    }


def _facts(
    source: RecognizedLora, written: Sequence[WrittenLora], target: LoraFormat, base: str | None
) -> Mapping[str, Any]:
    """Return the result for machine-readable output."""
    return {
        "family": source.facts.name,
        "component": source.naming.component,
        "from": source.spelling,
        "to": target,
        "modules": {"read": len(source.lora.pairs), "written": len(written)},
        "ranks": {
            "read": source.lora.stored_ranks,
            "written": sorted({lora.rank for lora in written}),
        },
        "raised": {lora.module: {"from": list(lora.ranks), "to": lora.rank} for lora in _raised(written)},
        "scaled": {lora.module: list(lora.scales) for lora in written if lora.scales},
        "rounded": [lora.module for lora in written if not lora.exact],
        "left_out": sorted(source.lora.unmatched),
        "checked_against": base,
    }


def _raised(written: Sequence[WrittenLora]) -> list[WrittenLora]:
    """Return the modules whose rank is higher than those of the LoRAs that they consist of."""
    return [lora for lora in written if lora.rank > max(lora.ranks)]


def _notes(source: RecognizedLora, written: Sequence[WrittenLora], target: LoraFormat, base: str | None) -> list[str]:
    """Return remarks for the user."""
    notes = [
        f"{source.weights.origin}: {source.title}, {source.spelling} -> {target}, "
        f"{pluralize(len(source.lora.pairs), 'module')} read, {len(written)} written"
    ]
    if raised := _raised(written):
        sums = sorted({f"{' + '.join(map(str, lora.ranks))} -> {lora.rank}" for lora in raised})
        notes.append(
            f"rank increased for {pluralize(len(raised), 'module')} that {target} fuses, as the file has separate LoRAs "
            f"({list_names([lora.module for lora in raised])}): {', '.join(sums)}"
        )
    for exact, how in ((True, "exactly"), (False, "in float32, rounded once")):
        scaled = [lora for lora in written if lora.scales and lora.exact is exact]
        if scaled:
            scales = sorted({scale for lora in scaled for scale in lora.scales})
            notes.append(
                f"{target} stores no alpha: lora_B of {pluralize(len(scaled), 'module')} is multiplied by "
                f"{', '.join(f'{scale:g}' for scale in scales[:5])}{' …' if len(scales) > 5 else ''}, {how}"
            )
    if note := unread_note(source.facts, target, "--to"):
        notes.append(note)
    if source.lora.unmatched:
        notes.append(
            f"{pluralize(len(source.lora.unmatched), 'key')} skipped: {list_names(sorted(source.lora.unmatched))}"
        )
    if base is not None:
        notes.append(f"every key matches a module and its shape in {base}, before and after conversion")
    return notes
