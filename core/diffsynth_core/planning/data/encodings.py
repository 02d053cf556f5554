"""The encodings of a run, and which of them are cached."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from diffsynth_core.data.cache import EncodingCache
from diffsynth_core.data.encoded_samples import EncodedSamples, encodings_folder
from diffsynth_core.data.samples import Sample
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.hub.file_cache import FileCache
from diffsynth_core.hub.identity import HASHING_THREADS, HashCache
from diffsynth_core.models.spec import EncoderFacts
from diffsynth_core.planning.data.encoding_keys import (
    component_paths,
    encoding_cache,
    entry_key,
    entry_memory,
    hash_cache,
    identify,
    inputs_of,
)
from diffsynth_core.planning.data.encodings_plan import EncoderPlan, EncodingRef, EncodingsPlan
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter, pluralize, verb


def with_encodings(plan: RunPlan, reporter: Reporter) -> RunPlan:
    """Return the plan with its encodings looked up, as `plan_encodings`."""
    return replace(plan, found_encodings=plan_encodings(plan, reporter))


def plan_encodings(plan: RunPlan, reporter: Reporter) -> EncodingsPlan:
    """Look up all needed encodings by the content that they depend on; hashes files whose hash is not cached."""
    memory = hash_cache(plan.output.cache)
    identities = identify(plan.model, plan.model.components, memory, reporter)
    if plan.data.encoded:
        return _already_encoded(plan, plan.data.encoded, identities, reporter)
    samples = {index: plan.data.samples.samples[index] for index in _needed(plan)}
    memory.read_all(
        (path for sample in samples.values() for path in sample.files),
        reporter,
        f"Hashing {plan.model.variant.target.kind}s",
    )
    entries = entry_memory(plan.output.cache)
    encoders = tuple(
        _plan_encoder(plan, encoder, identities[encoder.component], samples, memory, entries, reporter)
        for encoder in plan.model.variant.encoders
    )
    return EncodingsPlan(encoders, identities)


def _needed(plan: RunPlan) -> list[int]:
    """Return the indices of the samples whose encodings are needed: all of them in a precompute task."""
    if not plan.task.trains:
        return list(range(len(plan.data.samples.samples)))
    return sorted([*plan.data.steps.samples_needed(plan.output.start.first_step), *plan.data.held_out])


def _already_encoded(
    plan: RunPlan, encoded: EncodedSamples, identities: Mapping[str, Mapping[str, str]], reporter: Reporter
) -> EncodingsPlan:
    """Return precomputed encodings, and the recorded identity of the components' files.

    Raises:
        DiffSynthError: if one is damaged: the encoders that could encode it again are not loaded.
    """
    encoders, memory = [], entry_memory(plan.output.cache)
    for encoder in plan.model.variant.encoders:
        cache = EncodingCache(encodings_folder(encoded.folder, encoder.name), memory=memory)
        keys = {
            EncodingRef(index, choice): file.key
            for index, files in enumerate(encoded.files)
            for choice, file in enumerate(files[encoder.name])
        }
        if missing := _missing(cache, keys, encoder, reporter):
            raise DiffSynthError(
                f"{len(missing)} of {pluralize(len(keys), 'encoding')} in `{encoded.folder}` "
                f"{verb(len(missing), 'is', 'are')} damaged; the first is `{cache.path(keys[missing[0]])}`",
                f"run the command of `{plan.task.precompute_task}` again to encode them again",
            )
        reads_text = plan.model.facts.text_column in encoder.columns
        encoders.append(EncoderPlan(encoder, False, cache, keys, (), reads_text=reads_text))
    return EncodingsPlan(tuple(encoders), {**encoded.origin.components, **identities})


def _missing(
    cache: EncodingCache, keys: Mapping[EncodingRef, str], encoder: EncoderFacts, reporter: Reporter
) -> tuple[EncodingRef, ...]:
    """Return the encodings whose entries are missing or damaged, one for each entry; verifies those that are not
    known to be intact.
    """
    unknown = [key for key in dict.fromkeys(keys.values()) if not cache.is_known(key)]
    with (
        reporter.task(f"Checking {encoder.name}", len(unknown), "encodings") if unknown else nullcontext() as task,
        ThreadPoolExecutor(HASHING_THREADS) as pool,
    ):
        lacking = set()
        for key, whole in zip(unknown, pool.map(cache.has, unknown), strict=True):
            lacking |= set() if whole else {key}
            if task:
                task.advance()
    firsts: dict[str, EncodingRef] = {}
    for ref, key in keys.items():
        if key in lacking:
            firsts.setdefault(key, ref)
    return tuple(firsts.values())


def encodings_are_known(plan: RunPlan) -> bool:
    """Return whether all hashes are cached, so that planning the encodings reads no file."""
    memory = hash_cache(plan.output.cache)
    return all(memory.known(path) for path in _all_files(plan))


def _all_files(plan: RunPlan) -> Iterator[Path]:
    for name in plan.model.components:
        yield from component_paths(plan.model, name).values()
    for sample in () if plan.data.encoded else plan.data.samples.samples:
        yield from sample.files


def _plan_encoder(
    plan: RunPlan,
    encoder: EncoderFacts,
    identity: Mapping[str, str],
    samples: Mapping[int, Sample],
    memory: HashCache,
    entries: FileCache,
    reporter: Reporter,
) -> EncoderPlan:
    facts = plan.model.facts
    cache = encoding_cache(plan.output.cache, facts, encoder, entries)
    if not plan.task.trains:
        cache = EncodingCache(encodings_folder(plan.parameters.output_path, encoder.name), cache, entries)
    if encoder.component in plan.training.components:
        return EncoderPlan(encoder, True, cache, {}, ())
    reads_text = facts.text_column in encoder.columns
    keys = {
        EncodingRef(index, choice): entry_key(
            plan.model,
            plan.machine.mixed_precision,
            encoder,
            identity,
            inputs_of(facts, encoder, sample, caption),
            memory,
        )
        for index, sample in samples.items()
        for choice, caption in enumerate(sample.choices if reads_text else (sample.caption,))
    }
    missing = _missing(cache, keys, encoder, reporter)
    damaged = tuple(ref for ref in missing if cache.is_damaged(keys[ref]))
    return EncoderPlan(encoder, False, cache, keys, missing, damaged, reads_text)
