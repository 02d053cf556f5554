"""The first half of split training: encode the whole dataset into a folder of its own."""

import hashlib
import json
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
from diffsynth_core.planning.encodings import EncodingsPlan, plan_encodings
from diffsynth_core.planning.plan import Plan
from diffsynth_core.planning.two_stage import encoding_components, known_origin
from diffsynth_core.progress import Reporter, SilentReporter, pluralize
from diffsynth_core.training.encode import fill_cache
from diffsynth_core.training.loop import make_accelerator
from diffsynth_core.training.stop import StopRequest


def precompute(plan: Plan, reporter: Reporter, stop: StopRequest) -> EncodedSamples:
    """Encode all samples; the processes share them out, and one writes what the folder holds, last.

    Raises:
        DiffSynthError: when the folder holds other samples, or one cannot be encoded.
        Interrupted: when a stop is asked for; the same command goes on.
    """
    accelerator = make_accelerator(plan)
    reporter = reporter if accelerator.is_main_process else SilentReporter()
    with claim_folder(plan.parameters.output_path) if accelerator.is_main_process else nullcontext():
        return _process(plan, accelerator, reporter, stop)


def _process(plan: Plan, accelerator: Accelerator, reporter: Reporter, stop: StopRequest) -> EncodedSamples:
    folder = plan.parameters.output_path
    encodings = plan_encodings(plan, reporter)
    begun = EncodedSamples(folder, _origin(plan, encodings))
    _check_same(begun)
    if not encodings.components_to_load:
        reporter.info(f"All {pluralize(len(plan.samples.samples), 'sample')} are already encoded: no encoder is loaded")
    accelerator.wait_for_everyone()  # what is written from here on is not taken for something else's by another process
    if accelerator.is_main_process:
        for leftover in folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        write_encoded(begun)
    accelerator.wait_for_everyone()
    fill_cache(plan, encodings, load_family(plan.facts.name), accelerator, reporter, stop)
    for part in encodings.encoders:
        for index, key in part.keys.items():
            if index % accelerator.num_processes == accelerator.process_index:
                part.cache.fetch(key)
    accelerator.wait_for_everyone()
    done = replace(begun, samples=tuple(_relative(plan)), files=tuple(_files(encodings, len(plan.samples.samples))))
    if accelerator.is_main_process:
        write_encoded(done)
    accelerator.wait_for_everyone()
    return done


def _origin(plan: Plan, encodings: EncodingsPlan) -> Origin:
    """All that the encodings are made of."""
    keys = [[part.encoder.name, list(part.keys.values())] for part in encodings.encoders]
    made_by = encoding_components(plan.variant)
    return Origin(
        **known_origin(plan.parameters, plan.variant, plan.mixed_precision, plan.dataset_fingerprint),
        family=plan.facts.name,
        components={name: dict(files) for name, files in encodings.identities.items() if name in made_by},
        shapes=_fitting_shapes(plan),
        contents=hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
    )


def _fitting_shapes(plan: Plan) -> dict[str, dict[str, list[int]]]:
    """Shapes of the tensors that say which denoiser can read what a component makes."""
    shapes: dict[str, dict[str, list[int]]] = {}
    for constraint in plan.facts.shape_constraints:
        if constraint.component in plan.components:
            tensor, _ = constraint.source
            found = module_shapes(plan.components[constraint.component])
            shapes.setdefault(constraint.component, {})[tensor] = list(found[tensor])
    return shapes


def _check_same(begun: EncodedSamples) -> None:
    """Raises: DiffSynthError: when the folder was begun with other files."""
    if not holds_encoded_samples(begun.folder):
        return
    before = read_encoded(begun.folder).origin
    if before.fingerprint == begun.origin.fingerprint:
        return
    changed = [name for name, files in begun.origin.components.items() if files != before.components.get(name)]
    what = f"the files of {', '.join(changed)}" if changed else "the files of the dataset"
    raise DiffSynthError(
        f"{what} changed since the samples in `{begun.folder}` were encoded",
        "choose another `--output_path`, or encode with the same files",
    )


def _relative(plan: Plan) -> Iterator[Sample]:
    """The samples as a second half sees them: without the folder of the dataset."""
    base = plan.parameters.dataset_base_path
    for sample in plan.samples.samples:
        path = sample.target.path
        name = path.relative_to(base) if path.is_relative_to(base) else Path(path.name)
        yield replace(sample, target=replace(sample.target, path=name))


def _files(encodings: EncodingsPlan, count: int) -> Iterator[dict[str, EncodedFile]]:
    """The files of each sample, by encoder."""
    for index in range(count):
        yield {
            part.encoder.name: EncodedFile(part.keys[index], part.cache.path(part.keys[index]).stat().st_size)
            for part in encodings.encoders
        }
