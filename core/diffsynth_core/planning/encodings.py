"""The encodings of a run, and which of them are cached."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from diffsynth_core.data.cache import EncodingCache, encoding_key
from diffsynth_core.data.encoded_samples import EncodedSamples, encodings_folder
from diffsynth_core.data.media import MediaCrop
from diffsynth_core.data.samples import Sample
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.hub.file_cache import FileCache
from diffsynth_core.hub.identity import HASHING_THREADS, IDENTITIES, HashCache
from diffsynth_core.models.spec import EncoderFacts
from diffsynth_core.planning.encodings_plan import EncoderPlan, EncodingRef, EncodingsPlan
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter, pluralize, verb

ENTRIES = "encodings.jsonl"
"""File in the cache folder with the results of verifying encodings."""


def hash_cache(plan: RunPlan) -> HashCache:
    """Return the cache of file hashes, in the cache folder."""
    return HashCache(plan.output.cache / IDENTITIES)


def with_encodings(plan: RunPlan, reporter: Reporter) -> RunPlan:
    """Return the plan with its encodings looked up, as `plan_encodings`."""
    return replace(plan, found_encodings=plan_encodings(plan, reporter))


def plan_encodings(plan: RunPlan, reporter: Reporter) -> EncodingsPlan:
    """Look up all needed encodings by the content that they depend on; hashes files whose hash is not cached."""
    memory = hash_cache(plan)
    identities = _identify(plan, memory, reporter)
    if plan.data.encoded:
        return _already_encoded(plan, plan.data.encoded, identities, reporter)
    samples = {index: plan.data.samples.samples[index] for index in _needed(plan)}
    memory.read_all(
        (path for sample in samples.values() for path in sample.files),
        reporter,
        f"Hashing {plan.model.variant.target.kind}s",
    )
    entries = _entry_memory(plan)
    encoders = tuple(
        _plan_encoder(plan, encoder, identities[encoder.component], samples, memory, entries, reporter)
        for encoder in plan.model.variant.encoders
    )
    return EncodingsPlan(encoders, identities)


def _identify(plan: RunPlan, memory: HashCache, reporter: Reporter) -> dict[str, dict[str, str]]:
    """Return sha256 by component and file."""
    component_files = {name: _files_of(plan, name) for name in plan.model.components}
    memory.read_all(
        (path for files in component_files.values() for path in files.values()), reporter, "Hashing model files"
    )
    return {
        name: {label: memory.sha256(path) for label, path in files.items()} for name, files in component_files.items()
    }


def _needed(plan: RunPlan) -> list[int]:
    """Return the indices of the samples whose encodings are needed: all of them in a precompute task."""
    count = len(plan.data.samples.samples)
    return (
        plan.data.steps.samples_needed(plan.output.start.first_step, count) if plan.task.trains else list(range(count))
    )


def _entry_memory(plan: RunPlan) -> FileCache:
    """Return the cache of verified encodings, in the cache folder."""
    return FileCache(plan.output.cache / ENTRIES)


def _already_encoded(
    plan: RunPlan, encoded: EncodedSamples, identities: Mapping[str, Mapping[str, str]], reporter: Reporter
) -> EncodingsPlan:
    """Return precomputed encodings, and the recorded identity of the components' files.

    Raises:
        DiffSynthError: if one is damaged: the encoders that could encode it again are not loaded.
    """
    encoders, memory = [], _entry_memory(plan)
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
    """Return the encodings whose entries are missing or damaged; verifies those that are not known to be
    intact.
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
    return tuple(ref for ref, key in keys.items() if key in lacking)


def encodings_are_known(plan: RunPlan) -> bool:
    """Return whether all hashes are cached, so that planning the encodings reads no file."""
    memory = hash_cache(plan)
    return all(memory.known(path) for path in _all_files(plan))


def _all_files(plan: RunPlan) -> Iterator[Path]:
    for name in plan.model.components:
        yield from _files_of(plan, name).values()
    for sample in () if plan.data.encoded else plan.data.samples.samples:
        yield from sample.files


def _files_of(plan: RunPlan, component: str) -> dict[str, Path]:
    """Yield all files that a component's output depends on: weights, configuration, tokenizer, a merged LoRA."""
    files = plan.model.components[component]
    paths = [*files.paths, *([files.config_path] if files.config_path else [])]
    for parameter, tokenizer in plan.model.facts.tokenizers.items():
        if tokenizer.component == component and parameter in plan.model.tokenizers:
            folder = plan.model.tokenizers[parameter]
            paths += [folder / name for name in tokenizer.files if (folder / name).is_file()]
    fused_lora = (
        {"preset_lora_path": plan.model.fused_lora.file.path}
        if plan.model.fused_lora and plan.model.fused_lora.component == component
        else {}
    )
    return {f"{path.parent.name}/{path.name}": path for path in paths} | fused_lora


def _plan_encoder(
    plan: RunPlan,
    encoder: EncoderFacts,
    identity: Mapping[str, str],
    samples: Mapping[int, Sample],
    memory: HashCache,
    entries: FileCache,
    reporter: Reporter,
) -> EncoderPlan:
    cache = EncodingCache(plan.output.cache / "encodings" / plan.model.facts.name / encoder.name, memory=entries)
    if not plan.task.trains:
        cache = EncodingCache(encodings_folder(plan.parameters.output_path, encoder.name), cache, entries)
    if encoder.component in plan.training.components:
        return EncoderPlan(encoder, True, cache, {}, ())
    files = sorted(identity.values())
    reads_text = plan.model.facts.text_column in encoder.columns
    keys = {
        EncodingRef(index, choice): encoding_key(
            encoder=encoder.name,
            version=encoder.version,
            files=files,
            precision=_precision(plan, encoder.component),
            inputs=_inputs(plan, encoder, sample, caption, memory),
        )
        for index, sample in samples.items()
        for choice, caption in enumerate(sample.captions if reads_text else (sample.caption,))
    }
    missing = _missing(cache, keys, encoder, reporter)
    damaged = tuple(ref for ref in missing if cache.is_damaged(keys[ref]))
    return EncoderPlan(encoder, False, cache, keys, missing, damaged, reads_text)


def _precision(plan: RunPlan, component: str) -> str:
    """Return an encoder's compute dtype, and how its weights are rounded, if they are."""
    precision = plan.machine.mixed_precision
    if not plan.model.stored.get(component):
        return precision
    return f"{precision}, {plan.model.components[component].storage} weights"


def _inputs(plan: RunPlan, encoder: EncoderFacts, sample: Sample, caption: str, memory: HashCache) -> dict[str, object]:
    """Return the content that an encoding depends on: captions as text, media as the hash of their bytes and the
    crop.
    """
    inputs: dict[str, object] = {"extra_inputs": encoder.inputs}
    for column in encoder.columns:
        if column == plan.model.facts.text_column:
            inputs[column] = caption
        elif column in sample.values:
            inputs[column] = sample.values[column]
        elif column in sample.conditions:
            inputs[column] = [_content(crop, memory) for crop in sample.conditions[column]]
        else:
            inputs[column] = _content(sample.target.first_frame if encoder.first_frame_only else sample.target, memory)
    return inputs


def _content(crop: MediaCrop, memory: HashCache) -> list[object]:
    return [memory.sha256(crop.path), *crop.transform]
