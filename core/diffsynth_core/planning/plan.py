"""From resolved parameters to the plan of a run, with all problems collected."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffsynth_core.config.choices import TrainedDtype
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.resolve import Resolved, independent_problems, parameters_of_other_families
from diffsynth_core.config.tasks import TASKS, Task
from diffsynth_core.data.batches import BatchPlan, StepPlan
from diffsynth_core.data.encoded_samples import EncodedSamples
from diffsynth_core.data.samples import SampleSet
from diffsynth_core.errors import FaultsFound, Problem, collect_problems, report, report_missing
from diffsynth_core.files import default_cache_path, model_base_path
from diffsynth_core.models.registry import unread_note
from diffsynth_core.planning.data.dataset import missing_dataset, read_dataset
from diffsynth_core.planning.data.encodings_plan import EncodingsPlan
from diffsynth_core.planning.data.held_out import read_held_out, share_to_hold_out, validation_problems
from diffsynth_core.planning.data.two_stage import check_precompute_output, find_encoded, known_origin
from diffsynth_core.planning.drawing.jobs import GenerationJob
from diffsynth_core.planning.drawing.previews import plan_previews, preview_option_problems
from diffsynth_core.planning.machine.attention import attention_problems
from diffsynth_core.planning.machine.compilation import compilation_problems, contradictions
from diffsynth_core.planning.machine.context_parallel import context_parallel_problems
from diffsynth_core.planning.machine.device import choose_device, choose_precision, noise_problems, operations_in_tf32
from diffsynth_core.planning.machine.engines import REPLICATED, EngineChoice, engine_problems
from diffsynth_core.planning.memory.block_swap import with_number_of_blocks
from diffsynth_core.planning.model.components import find_components, shape_faults, stored_shares
from diffsynth_core.planning.model.lora_files import find_fused_lora
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.planning.model.replaced import drop_replaced_entries
from diffsynth_core.planning.output.folder import ResumePoint, cache_faults, check_output, dataset_fingerprint
from diffsynth_core.planning.output.mirror import mirror_problems
from diffsynth_core.planning.output.trackers import tracker_problems
from diffsynth_core.planning.output.uploads import upload_problems
from diffsynth_core.planning.probing import probe_problems, profile_problems
from diffsynth_core.planning.training.optimizer_choice import (
    OptimizerChoice,
    choose_optimizer,
    rate_warnings,
    with_kernel,
)
from diffsynth_core.planning.training.recomputation import recomputation_problems
from diffsynth_core.planning.training.targets import NOTHING_TRAINS, Training, find_training
from diffsynth_core.planning.training.updates import choose_dtype, dtype_problems, update_problems
from diffsynth_core.progress import Reporter


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """What a run trains on, and in which order.

    Attributes:
        samples: none in a plan without a dataset.
        encoded: samples that a train task trains on.
        steps: the batches of each epoch, and how many make up a step.
        held_out: indices of samples to validate on, sorted; no step trains on them.
        fingerprint: of the dataset; that of the precompute task for a train task; empty without a dataset.
    """

    samples: SampleSet
    steps: StepPlan
    fingerprint: str
    encoded: EncodedSamples | None = None
    held_out: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OutputPlan:
    """Where a run writes, and from where it continues.

    Attributes:
        cache: folder of encodings and file hashes.
    """

    start: ResumePoint
    cache: Path


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run computes with.

    Attributes:
        device: as torch names it.
        world_size: number of processes.
        context_parallel: number of consecutive processes that compute one sample together.
        engine: what distributes a step over them.
        tf32: kinds of float32 operations that a CUDA device computes in TF32.
    """

    device: str
    mixed_precision: str
    world_size: int = 1
    context_parallel: int = 1
    engine: EngineChoice = REPLICATED
    tf32: tuple[str, ...] = ()

    @property
    def data_parallel(self) -> int:
        """Number of micro-batches that are computed at once."""
        return self.world_size // self.context_parallel

    def share(self, process: int) -> int:
        """Return which of the micro-batches at once a process computes, possibly with others."""
        return process // self.context_parallel

    def counts(self, process: int) -> bool:
        """Return whether sums over all processes count what a process computes: of those that compute one sample
        together, the first.
        """
        return process % self.context_parallel == 0


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will do.

    Attributes:
        previews: what is drawn while the run goes on.
        found_encodings: None until they are looked up when the run starts: that hashes all files of the model and the
            dataset.
        missing: missing files, dataset or device. Such a plan can be displayed but not executed; without a dataset it
            has no samples.
        family_defaults: parameters that are at a default of this family only.
        blocks_chosen_for: bytes of GPU memory for which `blocks_to_swap` was chosen, if it was `auto`.
        fitted: parameters that `fit` set.
        warnings: nothing prevents the run, but this should be checked before GPU hours are spent.
    """

    parameters: Parameters
    model: ModelPlan
    data: DataPlan
    training: Training
    output: OutputPlan
    machine: Machine
    previews: tuple[GenerationJob, ...] = ()
    found_encodings: EncodingsPlan | None = None
    missing: tuple[Problem, ...] = ()
    family_defaults: tuple[str, ...] = ()
    blocks_chosen_for: int | None = None
    fitted: tuple[str, ...] = ()
    warnings: tuple[Problem, ...] = ()

    @property
    def task(self) -> Task:
        """The task of the run."""
        return TASKS[self.parameters.task]

    @property
    def encodings(self) -> EncodingsPlan:
        """The encodings of a run that has started.

        Raises:
            LookupError: if they have not been looked up.
        """
        if self.found_encodings is None:
            raise LookupError("the encodings of this plan have not been looked up")
        return self.found_encodings


def make_plan(
    resolved: Resolved,
    reporter: Reporter,
    world_size: int = 1,
    base: Path | None = None,
    without_files: bool = False,
    engine: EngineChoice = REPLICATED,
) -> RunPlan:
    """Plan a run: reads headers of weight files and images, and decodes the used part of each video once; reads no
    weights.

    Args:
        base: folder of downloaded models; None: the default one.
        without_files: report missing model files, dataset and device in the plan instead of raising.

    Raises:
        FaultsFound: all problems of parameters, model files, LoRA targets, dataset and output folder together, and
            with them what is missing, even if that alone would not be an error.
    """
    resolved = drop_replaced_entries(resolved)
    with collect_problems(missing_apart=without_files) as problems:
        task = TASKS[resolved.parameters.task]
        encoded = None if task.encodes else find_encoded(resolved)
        parameters = _with_inputs(resolved.parameters, encoded)
        found = _find_components(resolved, parameters, base or model_base_path(), encoded)
        if found and resolved.family is None:  # a recipe's family was known during resolution
            report(*parameters_of_other_families(parameters, found.facts.name, resolved.origins))
            resolved = replace(resolved, parameters=parameters).with_defaults_of(found.facts.name)
            parameters = resolved.parameters
        training = _find_training(parameters, found, resolved.invalid) if found else None
        if found and training:
            parameters = with_number_of_blocks(parameters, found, training)
        optimizer = _choose_optimizer(resolved, parameters)
        fused_lora = find_fused_lora(parameters, found) if found else None
        no_dataset = missing_dataset(parameters) if task.encodes and without_files and found else []
        report_missing(*no_dataset)
        samples = SampleSet((), ()) if no_dataset else _find_samples(parameters, found, encoded, reporter)
        if task.encodes and not found and resolved.origin("dataset_base_path").is_given:
            report(*missing_dataset(parameters))
        machine = _choose_machine(parameters, samples, world_size, engine)
        if task.trains:
            _check_step(resolved, parameters, found, optimizer, machine)
        report(*(shape_faults(found) if found else []))
        report(*validation_problems(parameters), *preview_option_problems(parameters))
        _check_other_places(parameters)
        samples, held_out = _hold_out(parameters, found, samples, reporter)
        steps = _step_plan(parameters, samples, machine.data_parallel, held_out) if samples else None
        previews = plan_previews(parameters, found, training, samples)
        report(*_context_parallel_problems(parameters, found, training, world_size, samples, previews))
        cache = parameters.cache_path or default_cache_path()
        report(*cache_faults(cache), *probe_problems(parameters))
        fingerprint = _fingerprint(parameters, encoded, None if no_dataset else samples)
        known_steps = None if no_dataset else steps
        start = _find_start(parameters, found, fingerprint, known_steps, machine.mixed_precision, reporter)
        optimizer = _with_kernel(parameters, optimizer, machine, start)
        report(*profile_problems(parameters, steps.total_steps - start.first_step if steps else 0))
    missing = tuple(problems.missing) if without_files else ()
    if resolved.problems or problems or not (found and training and samples and steps):
        of_files = independent_problems([*problems, *missing], resolved.invalid)
        raise FaultsFound([*resolved.problems, *of_files] or [Problem("the run cannot be planned")])
    return RunPlan(
        parameters=parameters,
        model=replace(found, stored=stored_shares(found), fused_lora=fused_lora),
        data=DataPlan(samples=samples, steps=steps, fingerprint=fingerprint or "", encoded=encoded, held_out=held_out),
        training=replace(training, optimizer=optimizer, dtype=_choose_dtype(parameters, machine)),
        output=OutputPlan(start=start, cache=cache),
        machine=machine,
        previews=previews,
        missing=missing,
        family_defaults=resolved.family_defaults,
        fitted=tuple(name for name, origin in resolved.origins.items() if origin.kind == "fit"),
        warnings=(*_warnings(resolved, samples), *_warnings_of_training(parameters, found, training, optimizer)),
    )


def _fingerprint(parameters: Parameters, encoded: EncodedSamples | None, samples: SampleSet | None) -> str | None:
    """Return the fingerprint of the dataset; None if there is none."""
    if encoded:
        return encoded.origin.dataset_fingerprint
    return dataset_fingerprint(parameters, samples) if samples else None


def _warnings_of_training(
    parameters: Parameters, found: ModelPlan, training: Training, optimizer: OptimizerChoice
) -> Iterator[Problem]:
    """Warn about a LoRA in a format that no other program reads, and about an unusual learning rate."""
    note = unread_note(found.facts, parameters.lora_format, "--lora_format")
    if note and training.lora_component == found.facts.denoiser:
        yield Problem(note)
    if TASKS[parameters.task].trains:
        yield from rate_warnings(parameters, optimizer)


def _warnings(resolved: Resolved, samples: SampleSet) -> Iterator[Problem]:
    """Yield warnings about values that others take precedence over, about a dataset that the user did not choose, and
    about unusual properties of the dataset.

    A rehearsal uses small images on purpose.
    """
    yield from resolved.warnings
    origin = resolved.origin("dataset_base_path")
    rehearsal = resolved.parameters.rehearse
    if samples.samples and not rehearsal and origin.kind in ("default", "recipe"):
        shown = f"default of {origin}" if origin.is_given else origin
        what = f"dataset: `{resolved.parameters.dataset_base_path}` ({shown})"
        yield Problem(what, "set yours with `--dataset_base_path`")
    for warning in samples.warnings:
        if not (rehearsal and warning.code in ("IMAGE_UPSCALED", "IMAGE_LOW_RESOLUTION")):
            yield warning


def _find_components(
    resolved: Resolved,
    parameters: Parameters,
    base: Path,
    encoded: EncodedSamples | None,
) -> ModelPlan | None:
    """Return the components in the files; None if a recipe or config file that names them is missing."""
    if resolved.incomplete:
        return None
    return find_components(parameters, resolved.family, base, encoded)


def _choose_machine(
    parameters: Parameters, samples: SampleSet | None, world_size: int, engine: EngineChoice
) -> Machine:
    """Return what the run computes with."""
    device = choose_device(parameters)
    mixed_precision = choose_precision(parameters, device)
    if samples and TASKS[parameters.task].trains:
        report_missing(*noise_problems(samples))
    return Machine(
        device=device,
        mixed_precision=mixed_precision,
        world_size=world_size,
        context_parallel=_context_parallel(parameters, world_size),
        engine=engine,
        tf32=operations_in_tf32(),
    )


def _context_parallel(parameters: Parameters, world_size: int) -> int:
    """Return how many processes compute a sample together: what does not divide their number is reported elsewhere."""
    asked = parameters.context_parallel
    return asked if TASKS[parameters.task].trains and world_size % asked == 0 else 1


def _planned_for(parameters: Parameters, machine: Machine) -> Machine:
    """Return what the run is planned for: a GPU in a dry run without a device, whatever this machine has."""
    if parameters.dry_run and parameters.device is None:
        return replace(machine, device="cuda", mixed_precision=parameters.mixed_precision or "bf16")
    return machine


def _find_start(
    parameters: Parameters,
    found: ModelPlan | None,
    fingerprint: str | None,
    steps: StepPlan | None,
    mixed_precision: str,
    reporter: Reporter,
) -> ResumePoint:
    """Return where the run starts in its output folder; a precompute task always starts at the beginning."""
    if TASKS[parameters.task].trains:
        return check_output(parameters, fingerprint, steps, mixed_precision, found, reporter)
    if found and fingerprint:
        check_precompute_output(parameters, known_origin(parameters, found.variant, mixed_precision, fingerprint))
    return ResumePoint()


def _with_inputs(parameters: Parameters, encoded: EncodedSamples | None) -> Parameters:
    """Return the parameters of a train task with the extra inputs that its samples were encoded with."""
    if encoded is None:
        return parameters
    return parameters.model_copy(update={"extra_inputs": tuple(encoded.origin.extra_inputs)})


def _find_training(parameters: Parameters, found: ModelPlan, invalid: frozenset[str]) -> Training:
    """Return what trains: nothing in a precompute task, whatever the parameters name."""
    if not TASKS[parameters.task].trains:
        return NOTHING_TRAINS
    return find_training(parameters, found, invalid)


def _choose_optimizer(resolved: Resolved, parameters: Parameters) -> OptimizerChoice:
    """Return the optimizer of a task that trains; a precompute task has none, whatever the parameters name."""
    if not TASKS[parameters.task].trains:
        return OptimizerChoice()
    return choose_optimizer(parameters, resolved.origin("optimizer"), resolved.invalid)


def _with_kernel(
    parameters: Parameters, optimizer: OptimizerChoice, machine: Machine, start: ResumePoint
) -> OptimizerChoice:
    """Return the optimizer with the kernel of what the run is planned for, or with that of the run to resume."""
    planned_for = _planned_for(parameters, machine)
    return with_kernel(
        optimizer,
        planned_for.device,
        planned_for.mixed_precision,
        sharded=machine.engine.spec.shards,
        recorded=start.fused_optimizer,
    )


def _choose_dtype(parameters: Parameters, machine: Machine) -> TrainedDtype:
    """Return what weights that train in full are kept in by what the run is planned for."""
    return choose_dtype(parameters, _planned_for(parameters, machine).mixed_precision, machine.engine.spec)


def _check_step(
    resolved: Resolved, parameters: Parameters, found: ModelPlan | None, optimizer: OptimizerChoice, machine: Machine
) -> None:
    """Report why a step cannot be as the parameters say."""
    planned_for = _planned_for(parameters, machine)
    _check_updates(parameters, optimizer, planned_for)
    _check_trackers(parameters)
    if found:
        _check_attention(parameters, found, planned_for)
        # As given: `parameters` has the number of blocks to swap.
        _check_compilation(resolved.parameters, found, machine.device)


def _check_updates(parameters: Parameters, optimizer: OptimizerChoice, machine: Machine) -> None:
    """Report why weights cannot be updated in the dtype, at the time and place, or by the engine that the run asks for,
    and why activations cannot be recomputed.
    """
    precision = machine.mixed_precision
    for problem in (
        *dtype_problems(parameters, optimizer, precision),
        *update_problems(parameters, optimizer, precision, machine.world_size),
        *recomputation_problems(parameters),
        *engine_problems(parameters, optimizer, precision, machine.engine),
    ):
        (report if problem.wrong_use else report_missing)(problem)  # another machine may compute otherwise


def _context_parallel_problems(
    parameters: Parameters,
    found: ModelPlan | None,
    training: Training | None,
    world_size: int,
    samples: SampleSet | None,
    previews: Sequence[GenerationJob],
) -> Iterator[Problem]:
    """Yield why processes cannot compute what the model reads and draws together."""
    if not (found and TASKS[parameters.task].trains):
        return
    read = [sample.target.shape for sample in samples.samples] if samples else []
    drawn = [(job.num_frames, job.height, job.width) for job in previews]
    trained = training.components if training else ()
    yield from context_parallel_problems(parameters, found, trained, world_size, [*read, *drawn])


def _check_trackers(parameters: Parameters) -> None:
    """Report trackers that do not exist, or whose packages are not installed."""
    for problem in tracker_problems(parameters):
        (report if problem.wrong_use else report_missing)(problem)


def _check_other_places(parameters: Parameters) -> None:
    """Report why the run cannot be copied to where its parameters say."""
    for problem in (*mirror_problems(parameters), *upload_problems(parameters)):
        (report if problem.wrong_use else report_missing)(problem)


def _check_attention(parameters: Parameters, found: ModelPlan, machine: Machine) -> None:
    """Report why attention cannot be computed by the kernel that the parameters name."""
    for problem in attention_problems(parameters, found.facts, machine.device, machine.mixed_precision):
        (report if problem.wrong_use else report_missing)(problem)


def _check_compilation(parameters: Parameters, found: ModelPlan, device: str) -> None:
    """Report why blocks cannot be compiled; a dry run without a device says nothing of a machine that is not this."""
    if not parameters.compile:
        return
    report(*contradictions(parameters, found))
    if not (parameters.dry_run and parameters.device is None):
        report_missing(*compilation_problems(device))


def _find_samples(
    parameters: Parameters,
    found: ModelPlan | None,
    encoded: EncodedSamples | None,
    reporter: Reporter,
) -> SampleSet | None:
    """Return the samples of the dataset, or those that are already encoded."""
    if encoded:
        return SampleSet(encoded.samples, ())
    if found is None or not TASKS[parameters.task].encodes:
        return None
    samples, faults = read_dataset(parameters, found.facts, found.variant, reporter)
    report(*faults)
    if samples and parameters.caption_dropout:
        droppable = tuple(replace(sample, with_empty_caption=True) for sample in samples.samples)
        return replace(samples, samples=droppable)
    return samples


def _hold_out(
    parameters: Parameters, found: ModelPlan | None, samples: SampleSet | None, reporter: Reporter
) -> tuple[SampleSet | None, tuple[int, ...]]:
    """Return the samples, with those of a file or folder to validate on behind them, and which of them are held out."""
    if not (found and samples and samples.samples and TASKS[parameters.task].trains):
        return samples, ()
    others, faults = read_held_out(parameters, found.facts, found.variant, reporter)
    report(*faults)
    if others is None:
        return samples, share_to_hold_out(parameters, samples)
    every = (*samples.samples, *others.samples)
    return replace(samples, samples=every), tuple(range(len(samples.samples), len(every)))


def _step_plan(
    parameters: Parameters, samples: SampleSet, data_parallel: int, held_out: tuple[int, ...] = ()
) -> StepPlan:
    buckets = [sample.bucket for sample in samples.samples]
    batches = BatchPlan(buckets, parameters.dataset_repeat, parameters.batch_size, parameters.seed, held_out)
    return StepPlan(
        batches, parameters.gradient_accumulation_steps * data_parallel, parameters.num_epochs, parameters.max_steps
    )
