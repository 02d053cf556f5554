"""Filling the encoding cache: each frozen encoder is loaded, applied to the missing samples, and freed."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from diffsynth_core.data.cache import CacheWriter
from diffsynth_core.data.samples import Sample
from diffsynth_core.errors import DiffSynthError, Interrupted, OutOfTime, raise_if_any
from diffsynth_core.hub.identity import HashCache
from diffsynth_core.models.family import Encoded, Family, encoder_dtype
from diffsynth_core.models.spec import EncoderFacts
from diffsynth_core.planning.data.encoder_inputs import check_encoded, load_input, load_tokenizers
from diffsynth_core.planning.data.encoding_batches import EncodingBatches
from diffsynth_core.planning.data.encoding_keys import hash_cache, inputs_of
from diffsynth_core.planning.data.encodings_plan import EncoderPlan, EncodingRef
from diffsynth_core.planning.memory.disk import packed_bytes
from diffsynth_core.planning.memory.sizes import largest_batch
from diffsynth_core.planning.model.loading import drop
from diffsynth_core.planning.output.folder import folder_faults
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter, pluralize, verb
from diffsynth_core.stop import StopRequest, out_of_time_before_first_step
from diffsynth_core.training.loading import load_for_run
from diffsynth_core.training.machines import share_of_samples
from diffsynth_core.training.read_ahead import ReadAhead
from diffsynth_core.training.workers import iterate


def load_columns(plan: RunPlan, encoder: EncoderFacts, sample: Sample, choice: int = 0) -> dict[str, Any]:
    """Load what an encoder reads of a sample, in the form in which data workers pass it on.

    Args:
        choice: which of the sample's captions (`Sample.choices`).

    Returns:
        Column -> the caption as a string, the target as `[3, F, H, W]` uint8, or the files of a condition as a list of
        such.
    """
    facts = plan.model.facts
    return {
        column: load_input(value) for column, value in inputs_of(facts, encoder, sample, sample.choices[choice]).items()
    }


class _RawSamples(Dataset[tuple[EncodingRef, dict[str, Any]]]):
    """The inputs of one encoder for the encodings `refs`."""

    def __init__(self, plan: RunPlan, encoder: EncoderFacts, refs: list[EncodingRef]) -> None:
        self._plan, self._encoder, self._refs = plan, encoder, refs

    def __getitem__(self, position: int) -> tuple[EncodingRef, dict[str, Any]]:
        ref = self._refs[position]
        sample = self._plan.data.samples.samples[ref.sample]
        return ref, load_columns(self._plan, self._encoder, sample, ref.choice)


def fill_cache(
    plan: RunPlan,
    family: Family,
    accelerator: Accelerator,
    reporter: Reporter,
    stop: StopRequest,
) -> None:
    """Encode the samples that are missing in the cache, distributed over the processes that share it.

    Raises:
        DiffSynthError: if an image or video cannot be decoded, or an entry cannot be written.
        Interrupted: if a stop is requested; finished entries are kept.
        OutOfTime: in all processes, if the time of one of them is over; finished entries are kept.
    """
    _check_cache(plan, reporter)
    number, shares = share_of_samples(plan, accelerator, reporter)
    with _out_of_time_together(accelerator), ReadAhead() as ahead:
        for part, components in _loaded_encoders(plan, family, accelerator, ahead, reporter, stop):
            refs = [ref for ref in part.missing if ref.sample % shares == number]
            _encode(plan, part, family, components, refs, hash_cache(plan.output.cache), reporter, stop)


@dataclass(frozen=True)
class EncodingSpeed:
    """How fast an encoder fills the cache.

    Attributes:
        encoder: its name.
        samples_per_second: of all processes, with loading samples and writing entries.
        missing: encodings that are still to be made.
    """

    encoder: str
    samples_per_second: float
    missing: int

    @property
    def seconds_left(self) -> float:
        """How long the missing encodings take."""
        return self.missing / self.samples_per_second


def measure_encoders(
    plan: RunPlan, family: Family, accelerator: Accelerator, batches: int, reporter: Reporter, stop: StopRequest
) -> list[EncodingSpeed]:
    """Encode what the largest micro-batch lacks, and measure each encoder that lacks anything on one sample of it.

    Args:
        batches: of an encoder, measured after one that warms up.

    Raises:
        DiffSynthError, Interrupted, OutOfTime: as `fill_cache`.
    """
    _check_cache(plan, reporter)
    number, shares = share_of_samples(plan, accelerator, reporter)
    hashes, speeds = hash_cache(plan.output.cache), []
    with _out_of_time_together(accelerator), ReadAhead() as ahead:
        for part, components in _loaded_encoders(plan, family, accelerator, ahead, reporter, stop):
            if refs := _missing_of_largest(plan, part):
                own = [ref for ref in refs if ref.sample % shares == number]
                _encode(plan, part, family, components, own, hashes, reporter, stop)
                speed = shares * _samples_per_second(plan, part, family, components, refs[0], batches, stop)
                speeds.append(EncodingSpeed(part.encoder.name, speed, len(part.missing) - len(refs)))
    return speeds


def _missing_of_largest(plan: RunPlan, part: EncoderPlan) -> list[EncodingRef]:
    """Return what is missing of the largest micro-batch, or else of the largest one that lacks anything."""
    refs: list[EncodingRef] = []
    for among in (plan.data.steps.samples_needed(0), {ref.sample for ref in part.missing}):
        if among and not refs:
            members = {ref.sample for ref in largest_batch(plan, among)}
            entries = {key for ref, key in part.keys.items() if ref.sample in members}
            refs = [ref for ref in part.missing if part.keys[ref] in entries]
    return refs


@torch.no_grad()
def _samples_per_second(
    plan: RunPlan,
    part: EncoderPlan,
    family: Family,
    components: dict[str, Any],
    ref: EncodingRef,
    count: int,
    stop: StopRequest,
) -> float:
    """Encode a sample again and again, in `count` full batches after one that warms up, and return the speed."""
    batches = EncodingBatches[EncodingRef].of(family, part.encoder, components)
    sample = load_columns(plan, part.encoder, plan.data.samples.samples[ref.sample], ref.choice)
    size = batches.kind_of(family.tokenize(part.encoder, components, sample)).size
    refs = [ref] * size * (1 + count)
    workers = min(plan.parameters.dataset_num_workers, len(refs))
    begun = 0.0
    with CacheWriter(part.cache) as writer:
        for number, (_, loaded) in enumerate(iterate(_RawSamples(plan, part.encoder, refs), range(len(refs)), workers)):
            stop.raise_if_set()
            stop.raise_if_out_of_time()
            for _, encoded in batches.add(ref, family.tokenize(part.encoder, components, loaded)):
                writer.write(part.keys[ref], encoded)
            if number + 1 == size:
                writer.wait()
                begun = time.perf_counter()
    return size * count / (time.perf_counter() - begun)


def _check_cache(plan: RunPlan, reporter: Reporter) -> None:
    """Check that the cache can be written to, and tell which of its entries are damaged."""
    if plan.task.trains and plan.encodings.components_to_load:
        raise_if_any(folder_faults(plan.output.cache, "cache_path"))
    for part in plan.encodings.encoders:
        if part.damaged:
            first = part.cache.path(part.keys[part.damaged[0]])
            reporter.warn(
                f"{pluralize(len(part.damaged), 'cached encoding')} of {part.encoder.name} "
                f"{verb(len(part.damaged), 'is', 'are')} damaged and will be encoded again; the first is `{first}`"
            )


@contextmanager
def _out_of_time_together(accelerator: Accelerator) -> Iterator[None]:
    """Raise `OutOfTime` at the end of the block in all processes, if one of them raises it."""
    late = torch.zeros((), device=accelerator.device)
    try:
        yield
    except OutOfTime:
        late += 1
    # Processes that have encoded their share wait here for the others, whose time may be over before.
    if accelerator.reduce(late, "sum") > 0:
        raise out_of_time_before_first_step()


def _loaded_encoders(
    plan: RunPlan,
    family: Family,
    accelerator: Accelerator,
    ahead: ReadAhead,
    reporter: Reporter,
    stop: StopRequest,
) -> Iterator[tuple[EncoderPlan, dict[str, Any]]]:
    """Yield the encoders of each component that must be loaded, with it and its tokenizers; then free them.

    While one encodes, the files of the component that is loaded after it are read ahead, the denoiser's at last.
    """
    names = plan.encodings.components_to_load
    following = (*names[1:], plan.model.facts.denoiser if plan.task.trains else None)
    for component, after in zip(names, following, strict=False):  # of no names, none follows
        stop.raise_if_set()
        stop.raise_if_out_of_time()
        components: dict[str, Any] = load_tokenizers(
            plan.model, family, component
        )  # first, because their faults show at once
        components[component] = load_for_run(
            plan, family, component, encoder_dtype(plan.machine.mixed_precision), accelerator.device, reporter
        )
        # Processes of a machine share what the system keeps; packed weights are read from elsewhere.
        if after and accelerator.is_local_main_process and after not in packed_bytes(plan):
            ahead.begin(plan.model.components[after].paths)
        for part in plan.encodings.encoders:
            if part.encoder.component == component:
                yield part, components
        drop(components, accelerator.device)  # the caller still has the mapping


@torch.no_grad()
def _encode(
    plan: RunPlan,
    part: EncoderPlan,
    family: Family,
    components: dict[str, Any],
    refs: list[EncodingRef],
    hashes: HashCache,
    reporter: Reporter,
    stop: StopRequest,
) -> None:
    workers = min(plan.parameters.dataset_num_workers, len(refs))
    raw = iterate(_RawSamples(plan, part.encoder, refs), range(len(refs)), workers)
    warnings: dict[str, list[int]] = {}
    batches = EncodingBatches[EncodingRef].of(family, part.encoder, components)
    with (
        reporter.task(f"Encoding {part.encoder.name}", len(refs), "samples") as task,
        CacheWriter(part.cache) as writer,
    ):

        def store(encodings: Iterable[tuple[EncodingRef, Encoded]]) -> None:
            for ref, encoded in encodings:
                sample = plan.data.samples.samples[ref.sample]
                check = partial(check_encoded, encoded, part.encoder.component, sample.name, sample.files, hashes)
                writer.write(part.keys[ref], encoded, check)
                task.advance()

        try:
            for ref, sample in raw:
                stop.raise_if_set()
                stop.raise_if_out_of_time()
                tokenized = family.tokenize(part.encoder, components, sample)
                try:
                    encoded = batches.add(ref, tokenized)
                except DiffSynthError as error:
                    (problem,) = error.problems
                    raise DiffSynthError(
                        f"{plan.data.samples.samples[ref.sample].name}: {problem.message}", problem.hint
                    ) from error
                store(encoded)
                if warning := family.truncation_warning(part.encoder, tokenized):
                    warnings.setdefault(warning, []).append(plan.data.samples.samples[ref.sample].row)
        except (Interrupted, OutOfTime):  # with a large encoder, what still waits may take minutes
            raise
        except Exception:  # a sample that cannot be loaded loses none of those before it
            store(batches.rest())
            raise
        for encoded_last in batches.rest():
            store([encoded_last])
            stop.raise_if_set()
            stop.raise_if_out_of_time()
    for warning, rows in warnings.items():
        reporter.warn(f"{warning}: {pluralize(len(rows), 'sample')}, the first is row {rows[0]}")
