"""The single declaration of all parameters: name, type, default, group, unit, families, help text.

The options of `diffsynth train`, the recipe schema, the JSON schema for editors, `recipe show` and the reference page
are generated from it. Parameters with `documented=True` exist in DiffSynth-Studio under the same names; the others
exist only here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter
from pydantic.fields import FieldInfo

from diffsynth_core.config.choices import (
    MAX_SAMPLING_STEPS,
    AttentionName,
    Checkpointing,
    HubName,
    LoraFormat,
    MixedPrecision,
    TrainedDtype,
    WeightDtype,
)
from diffsynth_core.config.durations import DURATION_WORDS, duration_seconds
from diffsynth_core.config.gpu_memory import MEMORY_WORDS, memory_bytes
from diffsynth_core.config.optimizer_args import read_arguments
from diffsynth_core.config.quant_options import read_quant_options
from diffsynth_core.json_files import InvalidJson, parse_json

GROUPS = {
    "run": "Run",
    "dataset": "Dataset",
    "size": "Image and video size",
    "model": "Model files",
    "training": "Training",
    "lora": "LoRA",
    "gradient": "Gradient",
    "output": "Output",
    "family": "Only some families",
}
"""Group -> its title in help and documentation."""


def _reject_bool(value: object) -> object:
    """Reject booleans as numbers: in Python, True is an int."""
    if isinstance(value, bool):
        raise ValueError("is not a number")
    return value


def _reject_empty(value: object) -> object:
    """Reject an empty path, which pathlib takes for the working folder, and a NUL, which no file name contains."""
    if value == "":
        raise ValueError("is empty")
    if isinstance(value, str) and "\0" in value:
        raise ValueError("contains a NUL character")
    return value


def _split_commas(value: object) -> object:
    """Convert `"a, b"` or `[a, b]` to `(a, b)`; spaces are stripped, an empty string is an empty list."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
        return tuple(part.strip() for part in value if part.strip())
    raise ValueError("is not a list of strings")


def _split_numbers(value: object) -> object:
    """Convert `"0.9, 0.99"` to `("0.9", "0.99")`, which pydantic reads as numbers; a list stays as it is."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return value


def _read_path_groups(value: object) -> object:
    """Convert JSON or a list of paths and lists of shard paths to a tuple of tuples of paths."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except InvalidJson as error:
            raise ValueError("is not a JSON list") from error
    if not isinstance(value, (list, tuple)):
        raise ValueError("is not a JSON list")
    groups = tuple(
        (item,) if isinstance(item, str) else tuple(item) if isinstance(item, (list, tuple)) else () for item in value
    )
    if any(not group or not all(isinstance(path, str) and path for path in group) for group in groups):
        raise ValueError("is not a JSON list")
    return groups


def _check_memory(value: object) -> object:
    """Accept a string that `memory_bytes` can read; a bare number has no unit."""
    if not isinstance(value, str):
        raise ValueError(f"is not {MEMORY_WORDS}")
    memory_bytes(value)
    return value.strip()


def _check_duration(value: object) -> object:
    """Accept a string that `duration_seconds` can read; a bare number has no unit."""
    if not isinstance(value, str):
        raise ValueError(f"is not {DURATION_WORDS}")
    duration_seconds(value)
    return value.strip()


def _read_split(value: object) -> object:
    """Accept a share as a number too."""
    return repr(value) if isinstance(value, float) else _reject_empty(value)


def _read_blocks(value: object) -> object:
    """Accept `auto`, or an integer as other parameters do."""
    if value == "auto":
        return value
    number = TypeAdapter(Integer).validate_python(value)
    if not 0 <= number <= MAX_INTEGER:
        raise ValueError("is not a number of blocks")
    return number


def _ungroup(groups: tuple[tuple[str, ...], ...]) -> list[str | list[str]]:
    """Invert `_read_path_groups`."""
    return [group[0] if len(group) == 1 else list(group) for group in groups]


MAX_INTEGER = 2**53
"""Maximum of parameters without a bound of their own: floats, as JSON readers use them, are exact up to it."""
REHEARSAL_AREA = 128 * 160
"""Maximum area of images in a rehearsal, in pixels."""
MAX_RATE = 1e30
"""Maximum of learning rate and weight decay: the optimizer divides by small numbers, and float32 ends at 3e38."""
Integer = Annotated[int, BeforeValidator(_reject_bool)]
"""An int; booleans are rejected."""
Number = Annotated[float, BeforeValidator(_reject_bool), Field(allow_inf_nan=False)]
"""A finite float; booleans are rejected."""
FilePath = Annotated[Path, BeforeValidator(_reject_empty)]
"""A path that is not empty."""
FolderName = Annotated[str, BeforeValidator(_reject_empty)]
"""Path of a folder, `model_id:folder`, or a URL."""
PreviewPrompts = Annotated[str, BeforeValidator(_reject_empty)]
"""A prompt, the path of a file with prompts, or `dataset`."""
CommaList = Annotated[tuple[str, ...], BeforeValidator(_split_commas, json_schema_input_type=str | list[str])]
"""A list of strings, or one string of comma-separated items."""
Beta = Annotated[float, BeforeValidator(_reject_bool), Field(ge=0, lt=1, allow_inf_nan=False)]
"""A decay rate of Adam's moments."""
NumberPair = Annotated[tuple[Beta, Beta], BeforeValidator(_split_numbers, json_schema_input_type=str | list[Beta])]
"""Two numbers, or one string with both, separated by a comma."""
Arguments = Annotated[str, BeforeValidator(read_arguments, json_schema_input_type=str | dict[str, Any])]
"""Arguments of a function, as sorted `name=value` words; a mapping in a file."""
MemorySize = Annotated[str, BeforeValidator(_check_memory)]
"""GPU memory: an amount such as `24GB`, or a card such as `4090`."""
Duration = Annotated[str, BeforeValidator(_check_duration)]
"""A time span, such as `3h50m`."""
QuantOptions = Annotated[str, BeforeValidator(read_quant_options, json_schema_input_type=str | dict[str, str])]
"""How models are quantized: entry -> method."""
BlockCount = Annotated[
    int | Literal["auto"],
    BeforeValidator(_read_blocks, json_schema_input_type=Annotated[int, Field(ge=0)] | Literal["auto"]),
]
"""A number of blocks, or the fewest that will do."""
Split = Annotated[str, BeforeValidator(_read_split, json_schema_input_type=str | float)]
"""Samples that are held out: a share, a metadata file or a folder."""
PathGroups = Annotated[
    tuple[tuple[str, ...], ...],
    BeforeValidator(_read_path_groups, json_schema_input_type=str | list[str | list[str]]),
    PlainSerializer(_ungroup),
]
"""Groups of paths: the files of each model."""

TYPE_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "path": "a path",
    "memory": MEMORY_WORDS,
    "duration": DURATION_WORDS,
    "blocks": "an integer from 0, or auto",
    "str": "a string",
    "split": "a share such as 0.05, or a path",
    "comma list": "a comma-separated list of strings",
    "number pair": "two comma-separated numbers",
    "quant options": "`entry:method` or `entry:method/module,module`, several with `;` between them",
    "arguments": "space-separated words `name=value`, each name once",
    "json list": "a JSON list of paths, or of lists of shard paths",
}
"""Type of a parameter -> what it accepts, in messages."""


Changes = Literal["numbers", "files", "speed", "nothing"]
"""What a different value of a parameter changes in a run.

- numbers: what a step computes
- files: which files are written, when, in which form, and where the run ends
- speed: time and memory
- nothing: none of these
"""

Compared = Literal["value", "course", "dataset", "weights", "precision", "storage", "micro_batches", "state"]
"""What must be equal for a run to be resumed, for a parameter that changes numbers.

- value: the value itself
- course: the value, unless the previous run ended in a non-finite loss, which other optimizer parameters may avoid
- dataset: the fingerprint of the dataset
- weights: the sha256 of the files of all components
- precision: the effective mixed precision
- storage: the components stored in 8-bit floats or quantized
- micro_batches: micro-batches per step (accumulation x processes / context_parallel)
- state: nothing, because the state contains what the parameter initialized
"""


Rehearsal = Literal["same", "removed", "unused", "own"]
"""What a rehearsal makes of a parameter.

- same: the value of the run, or a smaller one if it has a limit for rehearsals
- removed: nothing, because it is about files for the real weights
- unused: nothing, because it is about other places than the folder of the run
- own: the value for the rehearsal itself, which the command of the real run does not repeat
"""


def _setting(
    default: Any,
    group: str,
    type_name: str,
    help_text: str,
    *,
    changes: Changes,
    compared: Compared = "value",
    unit: str | None = None,
    families: tuple[str, ...] = (),
    documented: bool = True,
    family_defaults: Mapping[str, Any] | None = None,
    short: str | None = None,
    aliases: tuple[str, ...] = (),
    reads_data: bool = False,
    generates: bool = False,
    for_video: bool = False,
    in_recipes: bool = True,
    listed: bool = True,
    rehearsal: Rehearsal = "same",
    rehearsal_limit: int | None = None,
    **constraints: Any,
) -> Any:
    """Declare one parameter.

    A run recorded before a parameter was declared counts as one with its default: choose the default of a new
    parameter such that it preserves the previous behavior.

    Args:
        type_name: a key of `TYPE_WORDS`, or `choice`.
        changes: what a different value changes in a run.
        compared: what resuming compares if the parameter changes numbers.
        families: the families that the parameter applies to; default: all.
        documented: whether DiffSynth-Studio has the parameter.
        family_defaults: family -> default that replaces `default` there.
        short: letter of the short flag, as in `-v`.
        aliases: further names, which flags and files may use instead.
        reads_data: whether it affects how a run reads its dataset, which makes it an option of `dataset validate` too.
        generates: whether it is an option of `generate` too.
        for_video: whether it is about the length of clips or their frame rate.
        in_recipes: whether a recipe may set it; some are about a single command, and a recipe is for all its runs.
        listed: whether the full plan lists its value; some are about the plan itself.
        rehearsal: what a rehearsal makes of it.
        rehearsal_limit: the largest value in a rehearsal, unless a flag sets another; for sides: their product.
    """
    facts: dict[str, Any] = {
        "group": group,
        "type": type_name,
        "unit": unit,
        "families": families,
        "documented": documented,
        "changes": changes,
        "compared": compared,
        "family_defaults": dict(family_defaults or {}),
        "short": short,
        "aliases": aliases,
        "reads_data": reads_data,
        "generates": generates,
        "for_video": for_video,
        "in_recipes": in_recipes,
        "listed": listed,
        "rehearsal": rehearsal,
        "rehearsal_limit": rehearsal_limit,
    }
    if type_name == "int":
        constraints.setdefault("le", MAX_INTEGER)
    return Field(default=default, description=help_text, json_schema_extra={"x-setting": facts}, **constraints)


class Parameters(BaseModel):
    """The resolved parameters of one training run."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    # run
    recipe: str | None = _setting(
        None,
        "run",
        "str",
        "Recipe to take parameter values from; `diffsynth recipe list` lists all recipes",
        changes="nothing",
        documented=False,
        reads_data=True,
        in_recipes=False,
        listed=False,
        generates=True,
    )
    config: FilePath | None = _setting(
        None,
        "run",
        "path",
        "YAML file in recipe format; its values override those of the recipe",
        changes="nothing",
        documented=False,
        reads_data=True,
        in_recipes=False,
        listed=False,
        generates=True,
    )
    only: str | None = _setting(
        None,
        "run",
        "str",
        "Run only this stage of a recipe or config file with stages; default: all stages, in order",
        changes="nothing",
        documented=False,
        reads_data=True,
        in_recipes=False,
        generates=True,
    )
    rehearse: bool = _setting(
        False,
        "run",
        "bool",
        "Run the whole training on tiny random weights with the same architecture and file layout, to test it before renting a GPU",
        changes="nothing",
        documented=False,
        in_recipes=False,
        rehearsal="own",
    )
    dry_run: bool = _setting(
        False,
        "run",
        "bool",
        "Check everything, print the plan, and exit before loading any weights",
        changes="nothing",
        documented=False,
        in_recipes=False,
        listed=False,
        rehearsal="own",
        generates=True,
    )
    verbose: bool = _setting(
        False,
        "run",
        "bool",
        "Print the full plan: files, modules, parameters, memory and disk usage by part",
        changes="nothing",
        short="v",
        documented=False,
        in_recipes=False,
        listed=False,
        rehearsal="own",
    )
    resume: Literal["auto"] | None = _setting(
        None,
        "run",
        "choice",
        "auto: resume the run in `output_path` from its latest complete state, or start it if there is none; default: reject a folder that already contains a run",
        changes="nothing",
        documented=False,
        in_recipes=False,
    )
    seed: Integer = _setting(
        0,
        "run",
        "int",
        "Seed for noise, timesteps, sample order and LoRA initialization",
        changes="numbers",
        documented=False,
        ge=0,
        le=2**63 - 1,
        reads_data=True,
        generates=True,
    )
    max_steps: Integer | None = _setting(
        None,
        "run",
        "int",
        "Maximum number of optimizer steps in total, per stage if there are stages; default: train all epochs (rehearsal: 8 steps)",
        changes="files",
        unit="optimizer steps",
        documented=False,
        ge=1,
        rehearsal_limit=8,
    )
    max_time: Duration | None = _setting(
        None,
        "run",
        "duration",
        "Time limit of this command, encoding included, such as 3h50m: training stops early enough to be saved within it, with exit code 0, and `--resume auto` continues; for rented machines and batch systems",
        changes="files",
        documented=False,
        in_recipes=False,
        rehearsal="own",
    )
    probe: Integer | None = _setting(
        None,
        "run",
        "int",
        "Measure this many steps of the largest micro-batches, and as many batches of each encoder whose encodings are missing; print the speed, the time and cost of the whole run and, on a GPU, the peak memory; then exit. Only the cache is written: encodings of these samples and quantized weights",
        changes="nothing",
        unit="optimizer steps",
        documented=False,
        in_recipes=False,
        listed=False,
        rehearsal="own",
        ge=1,
    )
    profile: Integer | None = _setting(
        None,
        "run",
        "int",
        "Trace this many steps with the profiler of PyTorch, after two that warm up, write the trace into `output_path` for ui.perfetto.dev, and say what limits a step: data, the host or kernels; traced steps take longer",
        changes="nothing",
        unit="optimizer steps",
        documented=False,
        in_recipes=False,
        listed=False,
        rehearsal="own",
        ge=1,
    )
    price_per_hour: Number | None = _setting(
        None,
        "run",
        "float",
        "Price per hour of all machines of the run, in any currency: the run reports its expected cost once the speed is known, and its actual cost at the end",
        changes="nothing",
        documented=False,
        gt=0,
        le=MAX_RATE,
    )
    gpu_memory: MemorySize | None = _setting(
        None,
        "run",
        "memory",
        "Memory of the target GPU, such as 24GB, or its name, such as 4090 or A100-40; the plan reports whether the run fits and, if not, which changes make it fit",
        changes="nothing",
        documented=False,
        rehearsal="own",
        generates=True,
    )
    fit: bool = _setting(
        False,
        "run",
        "bool",
        "Apply the changes that make the run fit in `gpu_memory` (default: the memory of this machine's GPU), first those that only cost time, then those that reduce precision; values set by flags or `config`, batch size, LoRA rank and sizes are never changed; a resumed run keeps the settings it was trained with",
        changes="nothing",
        documented=False,
        in_recipes=False,
        rehearsal="own",
    )
    device: str | None = _setting(
        None,
        "run",
        "str",
        "cpu, cuda, cuda:1, mps …; default: the best available device",
        changes="speed",
        documented=False,
        rehearsal="own",
        generates=True,
    )
    mixed_precision: MixedPrecision | None = _setting(
        None,
        "run",
        "choice",
        "Dtype of frozen weights and of the computation: no (float32), bf16 or fp16; trained weights stay in float32, or `trained_dtype`; default: bf16 on a GPU, no on a CPU",
        changes="numbers",
        compared="precision",
        documented=False,
        generates=True,
    )
    num_processes: Integer | None = _setting(
        None,
        "run",
        "int",
        "Number of training processes on all machines, one per GPU, started with accelerate's launcher; when launched externally: the expected world size; default: one process, or the world size of the external launcher",
        changes="numbers",
        compared="micro_batches",
        unit="processes",
        documented=False,
        ge=1,
    )
    context_parallel: Integer = _setting(
        1,
        "run",
        "int",
        "Number of processes that compute one sample together, each a part of its tokens: activations of long videos take about that many times less memory per GPU, and that many times fewer micro-batches are computed at once; `num_processes` is a multiple of it",
        changes="numbers",
        compared="micro_batches",
        unit="processes",
        families=("wan",),
        documented=False,
        ge=1,
    )
    accelerate_config: str | None = _setting(
        None,
        "run",
        "str",
        "Configuration for accelerate's launcher: a preset (ddp, fsdp2, fsdp2offload, zero2, zero2offload, zero3) or a file. Its mixed_precision and, with DeepSpeed, its gradient_accumulation_steps and gradient_clipping override a recipe, but not flags or `config`; default: the one written by `accelerate config`, if any",
        changes="speed",
        documented=False,
    )
    num_machines: Integer | None = _setting(
        None,
        "run",
        "int",
        "Number of machines that train together, on each of which the command is started; each runs its share of `num_processes`; default: one, or that of the accelerate configuration",
        changes="speed",
        unit="machines",
        documented=False,
        in_recipes=False,
        ge=1,
    )
    machine_rank: Integer | None = _setting(
        None,
        "run",
        "int",
        "Number of this machine, from 0; the one with 0 saves",
        changes="speed",
        documented=False,
        in_recipes=False,
        ge=0,
    )
    main_process_ip: str | None = _setting(
        None,
        "run",
        "str",
        "Address or name of machine 0, as the other machines reach it",
        changes="speed",
        documented=False,
        in_recipes=False,
    )
    main_process_port: Integer | None = _setting(
        None,
        "run",
        "int",
        "Port of machine 0 where the processes meet, the same on all machines; default: a free one with one machine",
        changes="speed",
        documented=False,
        in_recipes=False,
        ge=1,
        le=65535,
    )

    # dataset
    dataset_base_path: FilePath = _setting(
        Path("data/example_image_dataset"),
        "dataset",
        "path",
        "Root folder of the dataset; media paths in the metadata are relative to it",
        changes="numbers",
        compared="dataset",
        reads_data=True,
    )
    dataset_metadata_path: FilePath | None = _setting(
        None,
        "dataset",
        "path",
        "Metadata file (.csv, .json, .jsonl); default: `metadata.csv`, `.json` or `.jsonl` in the root folder, else captions in .txt files next to the images",
        changes="numbers",
        compared="dataset",
        reads_data=True,
    )
    dataset_repeat: Integer = _setting(
        1,
        "dataset",
        "int",
        "Number of times the dataset is repeated per epoch; large values cost neither start-up time nor memory",
        changes="numbers",
        ge=1,
        reads_data=True,
    )
    dataset_num_workers: Integer = _setting(
        0,
        "dataset",
        "int",
        "Number of worker processes that load data; 0: load data in the training process",
        changes="speed",
        unit="processes",
        ge=0,
    )
    data_file_keys: CommaList = _setting(
        ("image", "video"),
        "dataset",
        "comma list",
        "Metadata columns that contain file paths; each cell is a path or a JSON list of paths",
        changes="numbers",
        reads_data=True,
    )
    batch_size: Integer = _setting(
        1,
        "dataset",
        "int",
        "Samples per micro-batch on each process; samples of the same shape are batched together",
        changes="numbers",
        unit="samples",
        documented=False,
        ge=1,
        reads_data=True,
    )
    caption_dropout: Number = _setting(
        0.0,
        "dataset",
        "float",
        "Probability that a sample is trained with the empty caption instead of its own, drawn for each sample and repeat of an epoch; teaches the model the unconditional prediction of classifier-free guidance; typical: 0.1",
        changes="numbers",
        documented=False,
        ge=0,
        lt=1,
    )
    cache_path: FilePath | None = _setting(
        None,
        "dataset",
        "path",
        "Folder for cached encodings, quantized weights, memory measurements and rehearsal weights; default: `$XDG_CACHE_HOME/diffsynth`, else `~/.cache/diffsynth`",
        changes="speed",
        documented=False,
        reads_data=True,
        generates=True,
    )

    # size
    height: Integer | None = _setting(
        None,
        "size",
        "int",
        "Fixed height, set together with `width`; default: dynamic resolution",
        changes="numbers",
        unit="pixels",
        ge=16,
        reads_data=True,
        rehearsal_limit=REHEARSAL_AREA,
        generates=True,
    )
    width: Integer | None = _setting(
        None,
        "size",
        "int",
        "Fixed width, set together with `height`; default: dynamic resolution",
        changes="numbers",
        unit="pixels",
        ge=16,
        reads_data=True,
        rehearsal_limit=REHEARSAL_AREA,
        generates=True,
    )
    max_pixels: Integer = _setting(
        1048576,
        "size",
        "int",
        "Maximum area at dynamic resolution: larger images are scaled down to it, smaller ones are never upscaled",
        changes="numbers",
        unit="pixels",
        ge=256,
        reads_data=True,
        rehearsal_limit=REHEARSAL_AREA,
        generates=True,
    )
    num_frames: Integer = _setting(
        81,
        "size",
        "int",
        "Frames per clip, of the form 4n + 1; a shorter clip is truncated to the largest 4n + 1 that it has",
        changes="numbers",
        unit="frames",
        families=("wan",),
        ge=1,
        reads_data=True,
        for_video=True,
        rehearsal_limit=9,
        generates=True,
    )
    frame_rate: Number | None = _setting(
        None,
        "size",
        "float",
        "Resample videos to this frame rate, so that the speed of motion is preserved; default: the frames as stored in the file",
        changes="numbers",
        unit="frames per second",
        families=("wan",),
        documented=False,
        ge=0.1,
        le=1000,
        reads_data=True,
        for_video=True,
    )
    clip_start: Literal["first", "middle", "random"] = _setting(
        "first",
        "size",
        "choice",
        "Which part of a longer video to use: its beginning, its middle, or a random position drawn once per video from the seed",
        changes="numbers",
        families=("wan",),
        documented=False,
        reads_data=True,
        for_video=True,
    )

    # model
    model_paths: PathGroups = _setting(
        (),
        "model",
        "json list",
        "Local weight files as a JSON list; each element is a file, a folder or a list of shards; with a recipe, they replace its files for the same components",
        changes="numbers",
        compared="weights",
        reads_data=True,
        generates=True,
    )
    model_id_with_origin_paths: CommaList = _setting(
        (),
        "model",
        "comma list",
        "Hub files as `model_id:glob`, stored in `$DIFFSYNTH_MODEL_BASE_PATH` (else `./models`) and downloaded if missing; local paths are accepted too",
        changes="numbers",
        compared="weights",
        reads_data=True,
        generates=True,
    )
    extra_inputs: CommaList = _setting(
        (),
        "model",
        "comma list",
        "Additional model inputs: metadata columns, or for Wan `input_image` and `end_image`, the first and last frame of the clip",
        changes="numbers",
        reads_data=True,
        generates=True,
    )
    fp8_models: CommaList = _setting(
        (),
        "model",
        "comma list",
        "Entries of the model parameters whose frozen weights are stored in 8-bit floats (e4m3), half the memory of bf16, and upcast for each computation; applies to the linear layers in blocks, which hold nearly all weights; any file of a list of shards stands for the whole list; not for components trained in full",
        changes="numbers",
        compared="storage",
        generates=True,
    )
    quant_options: QuantOptions = _setting(
        "",
        "model",
        "quant options",
        "Quantize frozen weights of the linear layers in blocks, as `entry:method`, several with `;` between them: fp8 (8-bit floats with a scale per row, about half the memory of bf16), int8 (8-bit integers with a scale per row) or nf4 (4 bits, about a quarter; bitsandbytes); `entry:method/NAME,NAME` excludes modules whose names end with NAME; not for components trained in full",
        changes="numbers",
        compared="storage",
        generates=True,
    )
    offload_models: CommaList = _setting(
        (),
        "model",
        "comma list",
        "Entries of the model parameters to offload; accepted for compatibility, has no effect: each component is loaded only for its own stage and freed after it",
        changes="speed",
    )

    # training
    learning_rate: Number = _setting(
        1e-4,
        "training",
        "float",
        "Learning rate; typical of AdamW: 1e-4 for LoRA, 1e-5 for full training",
        changes="numbers",
        compared="course",
        ge=0,
        le=MAX_RATE,
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = _setting(
        "constant",
        "training",
        "choice",
        "Learning-rate schedule after warmup: constant, or linear or cosine decay to 0 at the last step",
        changes="numbers",
        compared="course",
        documented=False,
    )
    lr_warmup_steps: Integer = _setting(
        0,
        "training",
        "int",
        "Number of steps over which the learning rate warms up from 0 to its full value",
        changes="numbers",
        compared="course",
        unit="optimizer steps",
        documented=False,
        ge=0,
    )
    max_grad_norm: Number | None = _setting(
        None,
        "training",
        "float",
        "Clip gradients to this global norm; default: no clipping",
        changes="numbers",
        compared="course",
        documented=False,
        gt=0,
    )
    num_epochs: Integer = _setting(1, "training", "int", "Number of epochs", changes="files", unit="epochs", ge=1)
    trainable_models: CommaList = _setting(
        (),
        "training",
        "comma list",
        "Components to train in full, for example dit, text_encoder, vae, controlnet, or modules of a component, for example dit.transformer_blocks.0.attn",
        changes="numbers",
    )
    find_unused_parameters: bool = _setting(
        False,
        "training",
        "bool",
        "Search for parameters without a gradient in distributed training; accepted for compatibility, has no effect: unused parameters are excluded from training",
        changes="nothing",
    )
    optimizer: str = _setting(
        "adamw",
        "training",
        "str",
        "Optimizer: adamw, adamw8bit, adafactor, came, lion, muon (matrices; AdamW for the rest) or prodigy; or a subclass of `torch.optim.Optimizer` by its dotted path, `package.module.Class`, from a flag or your own config file only",
        changes="numbers",
        documented=False,
        aliases=("customized_optimizer",),
    )
    optimizer_args: Arguments = _setting(
        "",
        "training",
        "arguments",
        "Arguments of the optimizer, such as `fused=true eps=1e-8`; an unknown one is an error that lists those of the optimizer",
        changes="numbers",
        documented=False,
    )
    ema_decay: Number | None = _setting(
        None,
        "training",
        "float",
        "Keep an exponential moving average (EMA) of the trained weights with this decay, such as 0.999, and save it next to each checkpoint as `….ema.safetensors`; the decay is smaller in the first steps, so that the first weights are forgotten; takes 4 bytes per trained number in the optimizer state and does not affect the weights; default: no average",
        changes="numbers",
        documented=False,
        gt=0,
        lt=1,
    )
    weight_decay: Number = _setting(
        0.01, "training", "float", "Weight decay", changes="numbers", compared="course", ge=0, le=MAX_RATE
    )
    adam_betas: NumberPair = _setting(
        (0.9, 0.999),
        "training",
        "number pair",
        "AdamW decay rates of the averages of the gradient and of its square",
        changes="numbers",
        compared="course",
        documented=False,
    )
    trained_dtype: TrainedDtype | None = _setting(
        None,
        "training",
        "choice",
        "Dtype of weights that train in full, and of their gradients; bf16 halves both: each update is computed in float32 and rounded stochastically, so that small ones are not lost; DeepSpeed updates a float32 copy of the weights instead. A LoRA is always float32. Default: float32; bf16 with ZeRO-1 and ZeRO-2 if `mixed_precision` is bf16",
        changes="numbers",
        documented=False,
    )
    attention: AttentionName = _setting(
        "auto",
        "training",
        "choice",
        "Attention kernel of the denoiser and the models beside it; all compute the same up to rounding. sdpa: the one that PyTorch prefers for the sizes, as auto does where `DIFFUSERS_ATTN_BACKEND` is not set; flash (CPU, CUDA), efficient or cudnn (CUDA): that of PyTorch alone, without the masks of batches with captions of different lengths; flash3 and sage are rejected, since diffusers computes no gradients with them",
        changes="speed",
        documented=False,
    )
    compile: bool = _setting(
        False,
        "training",
        "bool",
        "Compile the blocks of the denoiser with torch.compile, for each batch shape at its first step, which takes minutes; the same up to rounding; the plan counts the shapes. Needs a C++ compiler on a CPU, triton on CUDA; not with swapped blocks, `fused_backward` or `use_gradient_checkpointing_offload`",
        changes="speed",
        documented=False,
    )
    enable_optimizer_cpu_offload: bool = _setting(
        False,
        "training",
        "bool",
        "Keep the state of the optimizer in host memory; each tensor's part of it is copied to the device for its update and back, which computes the same; not with prodigy or a class of your own",
        changes="speed",
    )
    blocks_to_swap: BlockCount = _setting(
        0,
        "training",
        "blocks",
        "Keep the linear layers of this many frozen blocks of the denoiser, evenly spread, in host memory, and copy each block to the device while others compute; two are there at a time. If all blocks train: their weights and optimizer state, with `fused_backward` and gradient checkpointing. auto: the fewest with which the run fits in `gpu_memory`",
        changes="speed",
        unit="blocks",
        documented=False,
        rehearsal_limit=2,
    )
    enable_model_cpu_offload: bool = _setting(
        False,
        "training",
        "bool",
        "Swap all blocks of the denoiser that can be, like the largest possible `blocks_to_swap`; the name of DiffSynth-Studio",
        changes="speed",
    )
    cpu_offload_split_threshold: Number | None = _setting(
        None,
        "training",
        "float",
        "Copy swapped blocks with more parameters than this in parts, which takes less GPU memory for the two that are there at a time; default: whole blocks (DiffSynth-Studio: single layers)",
        changes="speed",
        unit="2^20 parameters",
        ge=0,
    )
    task: Literal[
        "sft", "sft:data_process", "sft:train", "direct_distill", "direct_distill:data_process", "direct_distill:train"
    ] = _setting(
        "sft",
        "training",
        "choice",
        "sft: supervised training; direct_distill: distillation into a few-step sampler, given by the metadata columns seed, rand_device, num_inference_steps and cfg_scale; `:data_process` precomputes the encodings of the dataset into `output_path`, and `:train` trains on that folder, set as `dataset_base_path`",
        changes="numbers",
        reads_data=True,
    )

    # lora
    lora_base_model: str | None = _setting(None, "lora", "str", "Component to apply LoRA to", changes="numbers")
    lora_target_modules: CommaList | None = _setting(
        None,
        "lora",
        "comma list",
        "Suffixes of the module names to apply LoRA to; a single value that is not a suffix of any name is a regular expression for full names; default: the family's documented list; empty: all linear layers of the repeated blocks",
        changes="numbers",
    )
    lora_rank: Integer = _setting(32, "lora", "int", "LoRA rank; alpha equals rank", changes="numbers", ge=1)
    lora_checkpoint: FilePath | None = _setting(
        None,
        "lora",
        "path",
        "LoRA file to initialize the trained LoRA from, in any `lora_format` and of the same rank",
        changes="numbers",
        compared="state",
        rehearsal="removed",
    )
    lora_format: LoraFormat = _setting(
        "diffsynth",
        "lora",
        "choice",
        "Key format of saved LoRA files: that of DiffSynth-Studio, diffusers, ComfyUI or kohya; takes precedence over an `align_to_opensource_format` of the recipe",
        changes="files",
        documented=False,
    )
    preset_lora_path: FilePath | None = _setting(
        None,
        "lora",
        "path",
        "LoRA file to merge into `preset_lora_model` before training, in any `lora_format`",
        changes="numbers",
        compared="weights",
        rehearsal="removed",
    )
    preset_lora_model: str | None = _setting(
        None,
        "lora",
        "str",
        "Component to merge the LoRA of `preset_lora_path` into",
        changes="numbers",
        rehearsal="removed",
    )

    # gradient
    use_gradient_checkpointing: bool = _setting(
        False,
        "gradient",
        "bool",
        "Recompute activations in the backward pass: less memory, more time",
        family_defaults={"wan": True},  # the Wan trainer of DiffSynth-Studio turns it on, whatever the flag says
        changes="speed",
    )
    use_gradient_checkpointing_offload: bool = _setting(
        False,
        "gradient",
        "bool",
        "Recompute activations, and offload the inputs of the recomputed blocks to host memory: even less GPU memory",
        changes="speed",
    )
    checkpointing: Checkpointing | None = _setting(
        None,
        "gradient",
        "choice",
        "What of the denoiser's blocks is recomputed, with `use_gradient_checkpointing`; full: each block, as a whole; nested: each block, and in it attention and feed-forward once more, so that of one block only one of these is in memory: less memory and more time; keep_attention: each block but the output of its attention, which is kept; keep_every_N: all blocks but every Nth, whose activations are kept: more memory and less time; default: full",
        changes="speed",
        documented=False,
    )
    fused_backward: bool = _setting(
        False,
        "gradient",
        "bool",
        "Update each weight in the backward pass, as soon as its gradient is there, and free that: no more than one gradient is in memory; computes the same; on one process, without accumulation, clipping or fp16; not with prodigy or a class of your own",
        changes="speed",
        documented=False,
    )
    gradient_accumulation_steps: Integer = _setting(
        1,
        "gradient",
        "int",
        "Micro-batches per optimizer step on each process",
        changes="numbers",
        compared="micro_batches",
        unit="micro-batches",
        ge=1,
        reads_data=True,
    )

    # output
    output_path: FilePath = _setting(
        Path("./models"),
        "output",
        "path",
        "Output folder of the run; default with a recipe or config file: `models/train/<its name>`; default of a rehearsal: a new folder below `rehearsals/`",
        changes="files",
        rehearsal="own",
    )
    remove_prefix_in_ckpt: str = _setting(
        "pipe.dit.",
        "output",
        "str",
        "Prefix to remove from the keys that start with it when saving a checkpoint",
        changes="files",
    )
    save_steps: Integer | None = _setting(
        None,
        "output",
        "int",
        "Save a checkpoint every N steps; default: once per epoch",
        changes="files",
        unit="optimizer steps",
        ge=1,
    )
    save_state_steps: Integer | None = _setting(
        None,
        "output",
        "int",
        "Save the training state for `--resume auto` every N steps; default: with every checkpoint",
        changes="files",
        unit="optimizer steps",
        documented=False,
        ge=1,
    )
    keep_states: Integer = _setting(
        2,
        "output",
        "int",
        "Number of latest states to keep: if the disk damages one, the run resumes from an older one; one more is on disk while it is being written",
        changes="files",
        unit="states",
        documented=False,
        ge=1,
    )
    keep_checkpoints: Integer | None = _setting(
        None,
        "output",
        "int",
        "Number of latest checkpoints to keep: older ones of the run are deleted once a newer one is saved; default: all",
        changes="files",
        unit="checkpoints",
        documented=False,
        ge=1,
    )
    keep_best: bool = _setting(
        False,
        "output",
        "bool",
        "Keep the checkpoint of the lowest validation loss as well, with `keep_checkpoints` and `validation_split`",
        changes="files",
        documented=False,
    )
    save_dtype: WeightDtype | None = _setting(
        None,
        "output",
        "choice",
        "Dtype of saved weights; default: float32 for LoRA, the dtype of the base file for full weights",
        changes="files",
        documented=False,
    )

    validation_split: Split | None = _setting(
        None,
        "output",
        "split",
        "Samples to measure the loss on, at fixed noise and timesteps, and not to train on: a share of the dataset such as 0.05, a metadata file whose media are in `dataset_base_path`, or a dataset folder; measured before the first step, with each checkpoint, and every `validate_every` steps, into `validation.jsonl`",
        changes="numbers",
        documented=False,
    )
    validate_every: Integer | None = _setting(
        None,
        "output",
        "int",
        "Also measure the validation loss every N steps; default: only before the first step and with each checkpoint",
        changes="files",
        unit="optimizer steps",
        documented=False,
        ge=1,
    )
    evaluate_ema: bool = _setting(
        False,
        "output",
        "bool",
        "Use the averaged weights of `ema_decay` for validation and previews, instead of the weights themselves; requires `validation_split` or `preview_prompts`",
        changes="files",
        documented=False,
    )
    preview_prompts: PreviewPrompts | None = _setting(
        None,
        "output",
        "str",
        "Prompts to draw during training, into `samples/`: a prompt, a file of prompts as for `generate --prompts` (.txt, .csv, .json, .jsonl), or `dataset` for its first four distinct captions with their images; drawn before the first step, every `preview_every` steps and after the last, each time from the same noise, at the most frequent size of the samples",
        changes="files",
        documented=False,
    )
    preview_every: Integer | None = _setting(
        None,
        "output",
        "int",
        "Draw the previews every N steps; default: after each checkpoint",
        changes="files",
        unit="optimizer steps",
        documented=False,
        ge=1,
    )
    preview_steps: Integer | None = _setting(
        None,
        "output",
        "int",
        "Number of sampling steps of a preview; default: that of the model's documentation",
        changes="files",
        unit="sampling steps",
        documented=False,
        rehearsal_limit=2,
        ge=1,
        le=MAX_SAMPLING_STEPS,
    )
    mirror: FolderName | None = _setting(
        None,
        "output",
        "str",
        "Folder or URL, such as `s3://bucket/run`, to copy checkpoints, states, metrics and previews to during training; if the machine is lost, copy them back to `output_path` and pass `--resume auto`; each stage has its own subfolder. URLs are those of fsspec, with its packages (s3fs, gcsfs, …) and their logins. A mirror that fails does not end the run",
        changes="files",
        documented=False,
        in_recipes=False,
        rehearsal="unused",
    )
    push_to_hub: str | None = _setting(
        None,
        "output",
        "str",
        "Repository `owner/name` to upload each checkpoint to during training, with a model card (figures, parameters, previews; no local path); created private unless `hub_public`, per stage as `owner/name-stage`. Uses the token of the hub's own login. A hub that fails does not end the run",
        changes="files",
        documented=False,
        in_recipes=False,
        rehearsal="unused",
    )
    hub: HubName | None = _setting(
        None,
        "output",
        "choice",
        "Hub of `push_to_hub`; default: that of downloads, `$DIFFSYNTH_DOWNLOAD_SOURCE` or modelscope",
        changes="files",
        documented=False,
        in_recipes=False,
        rehearsal="unused",
    )
    hub_public: bool = _setting(
        False,
        "output",
        "bool",
        "Create the repository of `push_to_hub` as public, or allow uploads to an existing public one; default: created private, and an existing public one is rejected",
        changes="files",
        documented=False,
        in_recipes=False,
        rehearsal="unused",
    )
    log_with: CommaList = _setting(
        (),
        "output",
        "comma list",
        "Trackers that receive the metrics of each step in addition to `metrics.jsonl`: csv (`loss.csv` in the output folder), tensorboard, wandb, trackio, swanlab; all but csv need a package. tensorboard, wandb and swanlab also receive previews. A tracker that fails does not end the run",
        changes="files",
        documented=False,
    )
    enable_tensorboard_log: bool = _setting(
        False, "output", "bool", "Same as `log_with` tensorboard; it writes `tensorboard_log/`", changes="files"
    )
    enable_swanlab_log: bool = _setting(False, "output", "bool", "Same as `log_with` swanlab", changes="files")
    swanlab_project: str | None = _setting(
        None,
        "output",
        "str",
        "Project of the run in SwanLab; default: `$SWANLAB_PROJECT`, or DiffSynth-Studio",
        changes="files",
    )
    enable_wandb_log: bool = _setting(False, "output", "bool", "Same as `log_with` wandb", changes="files")
    wandb_project: str | None = _setting(
        None,
        "output",
        "str",
        "Project of the run in Weights & Biases; default: `$WANDB_PROJECT`, or DiffSynth-Studio",
        changes="files",
    )
    enable_csv_log: bool = _setting(False, "output", "bool", "Same as `log_with` csv", changes="files")
    trackio_project: str | None = _setting(
        None,
        "output",
        "str",
        "Project of the run in trackio; default: `$TRACKIO_PROJECT`, or DiffSynth-Studio",
        changes="files",
        documented=False,
    )

    # family
    max_timestep_boundary: Number = _setting(
        1.0,
        "family",
        "float",
        "Upper end of the sampled range of the timestep table, as a fraction; 0 is the noisiest end",
        changes="numbers",
        ge=0,
        le=1,
    )
    min_timestep_boundary: Number = _setting(
        0.0,
        "family",
        "float",
        "Lower end of the sampled range of the timestep table, as a fraction",
        changes="numbers",
        ge=0,
        le=1,
    )
    tokenizer_path: str | None = _setting(
        None,
        "family",
        "str",
        "Tokenizer folder, or `model_id:folder`; default: the one next to the text encoder, else the family's own",
        changes="numbers",
        compared="weights",
        families=("qwen-image", "wan", "flux2"),
        reads_data=True,
        generates=True,
    )
    processor_path: FolderName | None = _setting(
        None,
        "family",
        "str",
        "Processor folder of Qwen-Image-Edit, or `model_id:folder`; default: the one next to the text encoder, else the family's own",
        changes="numbers",
        compared="weights",
        families=("qwen-image",),
        reads_data=True,
        generates=True,
    )
    tokenizer_1_path: str | None = _setting(
        None,
        "family",
        "str",
        "CLIP tokenizer of FLUX.1",
        changes="numbers",
        compared="weights",
        families=("flux",),
        reads_data=True,
        generates=True,
    )
    tokenizer_2_path: str | None = _setting(
        None,
        "family",
        "str",
        "T5 tokenizer of FLUX.1",
        changes="numbers",
        compared="weights",
        families=("flux",),
        reads_data=True,
        generates=True,
    )
    align_to_opensource_format: bool = _setting(
        False,
        "family",
        "bool",
        "Save LoRAs of FLUX.1 with the most widely supported key names; same as `lora_format` kohya",
        changes="files",
        families=("flux",),
    )
    initialize_model_on_cpu: bool = _setting(
        False, "family", "bool", "Load weights into host memory first, then move them to the device", changes="speed"
    )
    zero_cond_t: bool = _setting(
        False,
        "family",
        "bool",
        "Qwen-Image-Edit-2511: modulate the tokens of reference images with timestep 0",
        changes="numbers",
        families=("qwen-image",),
        generates=True,
    )

    def given(self, name: str) -> bool:
        """Return whether a flag, a file or a recipe sets the parameter, possibly to its default."""
        return name in self.model_fields_set


@dataclass(frozen=True)
class Setting:
    """The declaration of one parameter, as the generators of options, schema and documentation use it."""

    name: str
    type_name: str
    default: Any
    group: str
    unit: str | None
    families: tuple[str, ...]
    documented: bool
    changes: Changes
    compared: Compared
    family_defaults: Mapping[str, Any]
    short: str | None
    aliases: tuple[str, ...]
    choices: tuple[str, ...]
    help_text: str
    reads_data: bool
    generates: bool
    for_video: bool
    in_recipes: bool
    listed: bool
    rehearsal: Rehearsal
    rehearsal_limit: int | None

    def default_of(self, family: str | None) -> Any:
        """Return the default for a family."""
        return self.family_defaults.get(family or "", self.default)

    @property
    def fixed_on_resume(self) -> bool:
        """Whether a resumed run must have the same value as before."""
        return self.changes == "numbers" and self.compared in ("value", "course")

    @property
    def type_words(self) -> str:
        """What the parameter accepts, in words."""
        return f"one of {', '.join(self.choices)}" if self.choices else TYPE_WORDS[self.type_name]


def _choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the values of a `Literal` other than None."""
    options = getattr(field.annotation, "__args__", ())
    nested = [getattr(option, "__args__", (option,)) for option in options]
    return tuple(value for group in nested for value in group if isinstance(value, str))


def _read_settings() -> Iterator[Setting]:
    for name, field in Parameters.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        facts: dict[str, Any] = dict(extra["x-setting"])  # type: ignore[arg-type]
        yield Setting(
            name=name,
            type_name=facts["type"],
            default=field.default,
            group=facts["group"],
            unit=facts["unit"],
            families=facts["families"],
            documented=facts["documented"],
            changes=facts["changes"],
            compared=facts["compared"],
            family_defaults=facts["family_defaults"],
            short=facts["short"],
            aliases=facts["aliases"],
            choices=_choices(field) if facts["type"] == "choice" else (),
            help_text=field.description or "",
            reads_data=facts["reads_data"],
            generates=facts["generates"],
            for_video=facts["for_video"],
            in_recipes=facts["in_recipes"],
            listed=facts["listed"],
            rehearsal=facts["rehearsal"],
            rehearsal_limit=facts["rehearsal_limit"],
        )


SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _read_settings()}
"""Name -> declaration."""


ALIASES: dict[str, str] = {alias: name for name, setting in SETTINGS.items() for alias in setting.aliases}
"""Another name of a parameter -> its name."""


def as_plain(parameters: Parameters) -> dict[str, Any]:
    """Return the values as JSON and YAML represent them: lists for tuples, strings for paths."""
    return parameters.model_dump(mode="json")


DEFAULTS: dict[str, Any] = as_plain(Parameters())
"""The default of every parameter, plain."""
