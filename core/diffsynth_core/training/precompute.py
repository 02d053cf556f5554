"""The precompute task of two-stage training: encode a dataset into a folder."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from diffsynth_core.checkpoints.run_folder import claim_folder
from diffsynth_core.data.encoded_samples import (
    EncodedFile,
    EncodedSamples,
    Origin,
    holds_encoded_samples,
    read_encoded,
    write_encoded,
)
from diffsynth_core.data.samples import Sample
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.loading import module_shapes
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.data.encodings import with_encodings
from diffsynth_core.planning.data.encodings_plan import EncoderPlan
from diffsynth_core.planning.data.two_stage import encoding_components, known_origin
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter, SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.encode import fill_cache
from diffsynth_core.training.machines import local_world_size, sees_file_of_first
from diffsynth_core.training.pace import time_in_words
from diffsynth_core.training.setup import make_accelerator


def precompute(plan: RunPlan, reporter: Reporter, stop: StopRequest) -> EncodedSamples:
    """Encode all samples, distributed over the processes; the main process writes the manifest, last.

    Raises:
        DiffSynthError: if the folder contains other samples, or a sample cannot be encoded.
        Interrupted: if a stop is requested; the same command resumes.
    """
    started = time.monotonic()
    accelerator = make_accelerator(plan)
    reporter = reporter if accelerator.is_main_process else SilentReporter()
    with claim_folder(plan.parameters.output_path) if accelerator.is_main_process else nullcontext():
        encoded = _precompute(plan, accelerator, reporter, stop)
    reporter.info(f"Encoding has taken {time_in_words(plan, time.monotonic() - started)}")
    return encoded


def _precompute(plan: RunPlan, accelerator: Accelerator, reporter: Reporter, stop: StopRequest) -> EncodedSamples:
    folder = plan.parameters.output_path
    plan = with_encodings(plan, reporter)
    with_empty_caption = any(sample.with_empty_caption for sample in plan.data.samples.samples)
    manifest = EncodedSamples(folder, _origin(plan), with_empty_caption=with_empty_caption)
    _check_same(manifest)
    if not plan.encodings.components_to_load:
        number = len(plan.data.samples.samples)
        samples = f"All {number} samples are" if number > 1 else "The sample is"
        reporter.info(f"{samples} already encoded: no encoder is loaded")
    if local_world_size(accelerator) < accelerator.num_processes and not sees_file_of_first(folder, accelerator):
        raise DiffSynthError(
            f"the machines do not share `{folder}`, into which all of them encode",
            "pass an `--output_path` on a volume that all machines mount, or encode on one machine",
        )
    # Each process checks the folder above before one of them writes into it.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for leftover in folder.rglob(".*.tmp"):  # of a process that was killed while writing
            leftover.unlink(missing_ok=True)
        write_encoded(manifest)
    accelerator.wait_for_everyone()
    fill_cache(plan, load_family(plan.model.facts.name), accelerator, reporter, stop)
    for part in plan.encodings.encoders:
        for ref, key in part.keys.items():
            if ref.sample % accelerator.num_processes == accelerator.process_index:
                part.cache.fetch(key)
    accelerator.wait_for_everyone()
    complete = replace(manifest, samples=tuple(_relative(plan)), files=tuple(_files(plan)))
    if accelerator.is_main_process:
        write_encoded(complete)
    accelerator.wait_for_everyone()
    return complete


def _origin(plan: RunPlan) -> Origin:
    """Return what determines the encodings: parameters, files of encoders and dataset."""
    keys = [[part.encoder.name, _keys_of_captions(plan, part)] for part in plan.encodings.encoders]
    made_by = encoding_components(plan.model.variant)
    return Origin(
        **known_origin(plan.parameters, plan.model.variant, plan.machine.mixed_precision, plan.data.fingerprint),
        family=plan.model.facts.name,
        components={name: dict(files) for name, files in plan.encodings.identities.items() if name in made_by},
        shapes=_fitting_shapes(plan),
        contents=hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
    )


def _keys_of_captions(plan: RunPlan, part: EncoderPlan) -> list[str]:
    """Return an encoder's entries, without those of the empty caption, which can be added to encoded samples later."""
    samples = plan.data.samples.samples
    return [key for ref, key in part.keys.items() if ref.choice < len(samples[ref.sample].captions)]


def _fitting_shapes(plan: RunPlan) -> dict[str, dict[str, list[int]]]:
    """Shapes of the tensors that say which denoiser can read what a component makes."""
    shapes: dict[str, dict[str, list[int]]] = {}
    for constraint in plan.model.facts.shape_constraints:
        if constraint.component in plan.model.components:
            tensor, _ = constraint.source
            found = module_shapes(plan.model.components[constraint.component])
            shapes.setdefault(constraint.component, {})[tensor] = list(found[tensor])
    return shapes


def _check_same(manifest: EncodedSamples) -> None:
    """Check that an existing folder was encoded from the same files.

    Raises:
        DiffSynthError: if it was not.
    """
    if not holds_encoded_samples(manifest.folder):
        return
    before = read_encoded(manifest.folder).origin
    if before.fingerprint == manifest.origin.fingerprint:
        return
    changed = [name for name, files in manifest.origin.components.items() if files != before.components.get(name)]
    what = f"the files of {', '.join(changed)}" if changed else "the files of the dataset"
    raise DiffSynthError(
        f"{what} changed since the samples in `{manifest.folder}` were encoded",
        "choose another `--output_path`, or encode with the same files",
    )


def _relative(plan: RunPlan) -> Iterator[Sample]:
    """Return the samples with paths relative to the dataset, which the train task does not need."""
    base = plan.parameters.dataset_base_path
    for sample in plan.data.samples.samples:
        path = sample.target.path
        name = path.relative_to(base) if path.is_relative_to(base) else Path(path.name)
        yield replace(sample, target=replace(sample.target, path=name))


def _files(plan: RunPlan) -> Iterator[dict[str, tuple[EncodedFile, ...]]]:
    """Yield the encoding files of each sample, by encoder and caption."""
    for index, sample in enumerate(plan.data.samples.samples):
        files = {}
        for part in plan.encodings.encoders:
            keys = [part.key(index, choice) for choice in range(len(sample.choices) if part.reads_text else 1)]
            files[part.encoder.name] = tuple(EncodedFile(key, part.cache.path(key).stat().st_size) for key in keys)
        yield files
