"""`diffsynth merge-lora`."""

from pathlib import Path
from typing import Annotated

import typer

from diffsynth_cli.file_plans import DryRun, FamilyName, LeaveKeysOut, OutputFormat, Overwrite, PlanFormat
from diffsynth_cli.options import SPELLINGS
from diffsynth_cli.text.wrapping import help_with_examples
from diffsynth_core.config.choices import WeightDtype
from diffsynth_core.errors import Problem, raise_if_any

HELP = """Merge LoRAs into a base, or into one LoRA.

With --base, W' = W + sum of weight x (alpha / rank) B A is computed in float32 and rounded once; tensors that the LoRAs
do not change are copied byte for byte, into the same files. Without --base, the LoRAs become one, exactly: their ranks
add up. --rank takes the nearest LoRA of that rank instead, and reports how much is lost. Files with several key formats
are written in the format of the first; full-weight differences (.diff) can only be merged into a base.

A LoRA is FILE or FILE:WEIGHT, such as style.safetensors:0.8 or style.safetensors:-1. An existing file
with the full text as its name takes precedence, so names may contain colons."""
"""Help text of the command."""
EXAMPLES = (
    "diffsynth merge-lora --base 'Qwen/Qwen-Image:transformer/*.safetensors' --lora style.safetensors --output_path merged",
    "diffsynth merge-lora --base flux1-dev.safetensors --lora a.safetensors:0.7 --lora b.safetensors --output_path merged",
    "diffsynth merge-lora --lora a.safetensors --lora b.safetensors:-0.5 --output_path both.safetensors --rank 32",
)
"""Examples in the help text."""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "merge-lora", help=help_with_examples(HELP, *EXAMPLES), context_settings=SPELLINGS, no_args_is_help=True
    )(merge_lora)


def merge_lora(
    lora: Annotated[list[str], typer.Option("--lora", metavar="FILE[:WEIGHT]", help="A LoRA; repeatable")],
    output_path: Annotated[
        Path, typer.Option("--output_path", metavar="PATH", help="A folder, or a file that ends in .safetensors")
    ],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="WEIGHTS", help="A file, a folder, a shard index, or model_id:glob"),
    ] = None,
    dtype: Annotated[
        WeightDtype | None,
        typer.Option(
            "--dtype",
            help="Dtype of all floating-point tensors; default: as in the base, float32 for a merged LoRA",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="N", min=1, help="Maximum rank of a merged LoRA")
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max_shard_size", metavar="SIZE", help="Maximum size of a file; default: shards stay unchanged"),
    ] = None,
    family: FamilyName = None,
    allow_unmatched: LeaveKeysOut = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    output_format: OutputFormat = PlanFormat.TABLE,
) -> None:
    """Plan from headers, then merge piece by piece."""
    from diffsynth_cli import merges
    from diffsynth_core.conversion.plans import parse_size
    from diffsynth_core.weights.weighted_files import parse_lora

    raise_if_any(_use_problems(base, rank, max_shard_size, family))
    max_shard_bytes = parse_size(max_shard_size, "--max_shard_size") if max_shard_size else None
    files = [parse_lora(text) for text in lora]
    how = merges.Manner(dtype, allow_unmatched, overwrite, dry_run, output_format)
    if base is None:
        merges.into_one(files, output_path, rank, family, how)
    else:
        merges.into_base(base, files, output_path, max_shard_bytes, how)


def _use_problems(base: str | None, rank: int | None, max_shard_size: str | None, family: str | None) -> list[Problem]:
    """Report options that exclude each other."""
    problems = []
    if base is not None and rank is not None:
        problems.append(Problem("`--rank` cannot be used with `--base`", "remove one of them", True))
    if base is None and max_shard_size is not None:
        problems.append(Problem("`--max_shard_size` requires `--base`", "remove it", True))
    if base is not None and family is not None:
        problems.append(Problem("`--family` cannot be used with `--base`, whose family is known", "remove it", True))
    return problems
