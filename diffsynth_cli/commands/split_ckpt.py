"""`diffsynth split-ckpt`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffsynth_cli.file_plans import DryRun, FamilyName, OutputFormat, Overwrite, PlanFormat, carry_out
from diffsynth_cli.options import SPELLINGS
from diffsynth_cli.text.wrapping import help_with_examples
from diffsynth_core.config.choices import LoraFormat, SplitDtype, SplitLayout
from diffsynth_core.errors import FaultsFound, Problem

if TYPE_CHECKING:
    from diffsynth_core.conversion.plans import FilePlan

HELP = """Split a checkpoint by component or by size, or join the parts again.

By component, each gets a file of its full weights, `text_encoder.safetensors`, and one of its LoRA,
`dit.lora.safetensors`. Keys stay unchanged except for the component prefix, which is removed, unless --layout selects
other names. With --layout pretrained each is a folder instead, with the config.json and names that `from_pretrained` of
diffusers and transformers opens; with --layout comfyui a file with the names that ComfyUI reads. --dtype fp8_scaled
stores the layers of blocks in 8-bit floats with a scale, as ComfyUI does: half the size of bfloat16.

CKPT is a safetensors file, the shards of one model, their index, or a folder that contains one of these."""
"""Help text of the command."""
EXAMPLES = (
    "diffsynth split-ckpt epoch-0.safetensors --output_path parts --dry_run",
    "diffsynth split-ckpt step-9.safetensors --output_path parts --layout diffusers",
    "diffsynth split-ckpt step-9.safetensors --output_path parts --layout pretrained --config base/transformer",
    "diffsynth split-ckpt step-9.safetensors --output_path parts --layout comfyui --dtype fp8_scaled",
    "diffsynth split-ckpt old.safetensors --output_path parts --unprefixed dit",
    "diffsynth split-ckpt transformer --output_path shards --by size",
    "diffsynth split-ckpt parts --output_path whole --join",
)
"""Examples in the help text."""


class By(StrEnum):
    """Values of `--by`."""

    COMPONENT = "component"
    SIZE = "size"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "split-ckpt", help=help_with_examples(HELP, *EXAMPLES), context_settings=SPELLINGS, no_args_is_help=True
    )(split_checkpoint)


def split_checkpoint(
    checkpoint: Annotated[list[Path], typer.Argument(metavar="CKPT", help="Checkpoint to split, or parts to join")],
    output_path: Annotated[Path, typer.Option("--output_path", metavar="DIR", help="Output folder")],
    by: Annotated[By, typer.Option("--by", help="One file per component, or shards of some size")] = By.COMPONENT,
    join: Annotated[
        bool, typer.Option("--join", help="Join shards, or the parts of a checkpoint, into one file")
    ] = False,
    unprefixed: Annotated[
        str | None, typer.Option("--unprefixed", metavar="NAME", help="Component of keys whose prefix was removed")
    ] = None,
    layout: Annotated[
        SplitLayout | None,
        typer.Option(
            "--layout",
            help="Key names of full weights, those of ComfyUI, or folders for `from_pretrained`; default: unchanged",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            metavar="[NAME=]PATH",
            help="config.json of a component, or its folder, for --layout pretrained; repeatable; default: that of the run's base model, else inferred from shapes",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        SplitDtype | None,
        typer.Option("--dtype", help="Dtype of full weights; default: unchanged", show_default=False),
    ] = None,
    lora_format: Annotated[
        LoraFormat | None,
        typer.Option("--lora_format", help="Key format of LoRAs; default: unchanged", show_default=False),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max_shard_size", metavar="SIZE", help="Maximum size of a file; default with --by size: 5GB"),
    ] = None,
    family: FamilyName = None,
    allow_unmatched: Annotated[
        bool, typer.Option("--allow_unmatched", help="Skip tensors that belong to no component or layout")
    ] = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    output_format: OutputFormat = PlanFormat.TABLE,
) -> None:
    """Plan from headers, then copy bytes."""
    from diffsynth_core.conversion.full_weights import SplitChoices
    from diffsynth_core.conversion.join import plan_join
    from diffsynth_core.conversion.plans import DEFAULT_SHARD_SIZE, parse_size
    from diffsynth_core.conversion.split import plan_split, plan_split_by_size
    from diffsynth_core.weights.weight_sets import open_weights

    given = {
        "by size": by is By.SIZE,
        "join": join,
        "unprefixed": unprefixed is not None,
        "layout": layout is not None,
        "config": bool(config),
        "dtype": dtype is not None,
        "lora_format": lora_format is not None,
        "max_shard_size": max_shard_size is not None,
        "family": family is not None,
        "allow_unmatched": allow_unmatched,
    }
    _check_together(given)
    max_shard_bytes = parse_size(max_shard_size, "--max_shard_size") if max_shard_size else None

    def plan() -> "FilePlan":
        if join:
            return plan_join(checkpoint, output_path)
        weights = open_weights(checkpoint)
        if by is By.SIZE:
            return plan_split_by_size(weights, output_path, max_shard_bytes or DEFAULT_SHARD_SIZE)
        choices = SplitChoices(
            default_component=unprefixed,
            family=family,
            layout=layout,
            dtype=dtype,
            configs=tuple(config or ()),
            lora_format=lora_format,
            max_shard_bytes=max_shard_bytes,
            allow_unmatched=allow_unmatched,
        )
        return plan_split(weights, output_path, choices)

    carry_out(plan(), overwrite, dry_run, output_format)


ONLY_BY_COMPONENT = ("unprefixed", "layout", "config", "dtype", "lora_format", "family", "allow_unmatched")
"""Options that have no effect when splitting by size."""
EXCLUDED = {"join": ("by size", "max_shard_size", *ONLY_BY_COMPONENT), "by size": ONLY_BY_COMPONENT}
"""Options that have no effect with another."""


def _check_together(given: dict[str, bool]) -> None:
    """Raises: FaultsFound: for options that exclude each other."""
    problems = [
        Problem(f"`--{other}` cannot be used with `--{option}`", f"remove `--{other}`", wrong_use=True)
        for option, others in EXCLUDED.items()
        for other in others
        if given[option] and given[other]
    ]
    if problems:
        raise FaultsFound(problems)
