"""Encodings of jobs: by the encoders of training, from the cache where it has them, written to it otherwise."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffsynth_core.data.cache import EncodingCache
from diffsynth_core.data.conditions import Condition
from diffsynth_core.data.images import read_image_header
from diffsynth_core.data.media import MediaCrop, choose_reference, is_clip
from diffsynth_core.data.videos import count_frames
from diffsynth_core.errors import list_names, truncate
from diffsynth_core.generation.generation_plan import GenerationPlan
from diffsynth_core.hub.identity import HashCache
from diffsynth_core.models.family import Encoded, Family, encoder_dtype
from diffsynth_core.models.spec import EncoderFacts, Variant
from diffsynth_core.planning.data.encoder_inputs import check_encoded, load_input, load_tokenizers
from diffsynth_core.planning.data.encoding_batches import EncodingBatches
from diffsynth_core.planning.data.encoding_keys import (
    ColumnInput,
    ConditioningFrames,
    EncoderInputs,
    encoding_cache,
    entry_key,
    entry_memory,
    hash_cache,
    identify,
)
from diffsynth_core.planning.drawing.jobs import GenerationJob
from diffsynth_core.planning.model.loading import drop, load_planned
from diffsynth_core.progress import Reporter
from diffsynth_core.stop import StopRequest


@dataclass(frozen=True)
class Entry:
    """An encoding that a job needs, and its place in the cache."""

    encoder: EncoderFacts
    inputs: dict[str, ColumnInput]
    cache: EncodingCache
    key: str

    @property
    def files(self) -> list[Path]:
        """The files that it is made from."""
        found: list[Path] = []
        for value in self.inputs.values():
            if isinstance(value, tuple):
                found += [crop.path for crop in value]
            elif isinstance(value, ConditioningFrames):
                found += [crop.path for _, crop in value.given]
        return found

    @property
    def name(self) -> str:
        """What it is made from, for messages."""
        texts = [truncate(value) for value in self.inputs.values() if isinstance(value, str)]
        return list_names([str(path) for path in self.files] or texts)


@dataclass(frozen=True)
class EncodedJob:
    """The encodings of a job in the cache; `negative`: those with the negative prompt, empty without guidance."""

    positive: tuple[Entry, ...]
    negative: tuple[Entry, ...]

    def read(self, family: Family) -> tuple[Encoded, Encoded | None]:
        """Return the encodings with the prompt, and with the negative one if there is guidance.

        Raises:
            DiffSynthError: if an entry is gone.
        """
        positive = _read(self.positive)
        return positive, family.negative_encoding(positive, _read(self.negative)) if self.negative else None


def _read(entries: Iterable[Entry]) -> Encoded:
    merged: Encoded = {}
    for entry in entries:
        merged |= entry.cache.read(entry.key)
    return merged


def encode_jobs(plan: GenerationPlan, family: Family, reporter: Reporter, stop: StopRequest) -> list[EncodedJob]:
    """Encode prompts and images of all jobs, with one component in memory after the other.

    Raises:
        DiffSynthError: if an image cannot be read, or an encoding contains NaN or Inf.
        Interrupted: if a stop is requested; finished encodings are kept.
    """
    hashes = hash_cache(plan.cache)
    jobs = _look_up(plan, hashes, reporter)
    every = {(entry.encoder.name, entry.key): entry for job in jobs for entry in (*job.positive, *job.negative)}
    missing = [entry for entry in every.values() if not entry.cache.has(entry.key)]
    for component in dict.fromkeys(entry.encoder.component for entry in missing):
        stop.raise_if_set()
        of_component = [entry for entry in missing if entry.encoder.component == component]
        _encode(plan, family, component, of_component, hashes, reporter, stop)
    return jobs


def _look_up(plan: GenerationPlan, hashes: HashCache, reporter: Reporter) -> list[EncodedJob]:
    """Return the entries of all jobs, whether they exist or not."""
    model, text_column = plan.model, plan.model.facts.text_column
    encoders = [encoder for encoder in model.variant.encoders if _is_needed(encoder, model.variant)]
    memory = entry_memory(plan.cache)
    caches = {encoder: encoding_cache(plan.cache, model.facts, encoder, memory) for encoder in encoders}
    identities = identify(model, dict.fromkeys(encoder.component for encoder in encoders), hashes, reporter)
    images = (path for job in plan.jobs for paths in job.images.values() for path in paths)
    hashes.read_all(images, reporter, "Hashing images")

    def entries(inputs: EncoderInputs, encoders: Iterable[EncoderFacts], prompt: str) -> Iterator[Entry]:
        for encoder in encoders:
            read = inputs.of(encoder, text_column, prompt)
            identity = identities[encoder.component]
            key = entry_key(model, plan.machine.mixed_precision, encoder, identity, read, hashes)
            yield Entry(encoder, read, caches[encoder], key)

    found = []
    for job in plan.jobs:
        inputs = inputs_of_job(plan, job)
        of_prompt = [encoder for encoder in encoders if text_column in encoder.columns] if job.is_guided else []
        found.append(
            EncodedJob(
                tuple(entries(inputs, encoders, job.prompt)), tuple(entries(inputs, of_prompt, job.negative_prompt))
            )
        )
    return found


def _is_needed(encoder: EncoderFacts, variant: Variant) -> bool:
    """Return whether an encoder is run without a target: not if it makes nothing else than the target's latents."""
    return variant.target.column not in encoder.columns or bool(encoder.inputs) or encoder.latents is None


def inputs_of_job(plan: GenerationPlan, job: GenerationJob) -> EncoderInputs:
    """Return what the encoders read of a job, its images at the sizes that their rules state."""
    shape = (job.num_frames, job.height, job.width)
    frames = tuple(
        (frame, _frame(path, frame, job))
        for name, frame in plan.model.facts.frame_inputs.items()
        for path in job.images.get(name, ())
    )
    conditions = {
        condition.name: tuple(
            _reference(path, condition, job, plan.max_pixels) for path in job.images.get(condition.column, ())
        )
        for condition in plan.model.variant.conditions
    }
    return EncoderInputs(ConditioningFrames(shape, frames), conditions, job.values)


def _frame(path: Path, frame: int, job: GenerationJob) -> MediaCrop:
    """Return an image as a frame of a job: it covers the frame and is center-cropped.

    Of a clip, it is the frame with that number among as many as the job has.
    """
    if is_clip(path):
        start = frame if frame >= 0 else count_frames(path, None, job.num_frames) + frame
        return MediaCrop(path, job.height, job.width, video=True, start=start)
    return MediaCrop(path, job.height, job.width, converted=bool(read_image_header(path).colors.profile))


def _reference(path: Path, condition: Condition, job: GenerationJob, max_pixels: int) -> MediaCrop:
    target = MediaCrop(path, job.height, job.width, video=job.num_frames > 1, frames=job.num_frames)
    if condition.media == "video":
        return target
    return choose_reference(path, read_image_header(path), condition, target, max_pixels)


@torch.no_grad()
def _encode(
    plan: GenerationPlan,
    family: Family,
    component: str,
    entries: list[Entry],
    hashes: HashCache,
    reporter: Reporter,
    stop: StopRequest,
) -> None:
    """Load a component, encode with it, and drop it."""
    device, dtype = torch.device(plan.machine.device), encoder_dtype(plan.machine.mixed_precision)
    components: dict[str, Any] = load_tokenizers(plan.model, family, component)
    components[component] = load_planned(plan.model, family, component, dtype, device, reporter)
    encoders = dict.fromkeys(entry.encoder for entry in entries)
    batches = {encoder: EncodingBatches[Entry].of(family, encoder, components) for encoder in encoders}
    warned = set()
    with reporter.task(f"Encoding with the {component}", len(entries), "inputs") as task:

        def store(encodings: Iterable[tuple[Entry, Encoded]]) -> None:
            for entry, encoded in encodings:
                check_encoded(encoded, component, entry.name, entry.files, hashes)
                entry.cache.write(entry.key, encoded)
                task.advance()

        for entry in entries:
            stop.raise_if_set()
            columns = {column: load_input(value) for column, value in entry.inputs.items()}
            tokenized = family.tokenize(entry.encoder, components, columns)
            store(batches[entry.encoder].add(entry, tokenized))
            warned.add(family.truncation_warning(entry.encoder, tokenized))
        for some in batches.values():
            store(some.rest())
    drop(components, device)
    for warning in sorted(filter(None, warned)):
        reporter.warn(warning)
