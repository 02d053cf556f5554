"""`diffsynth convert-lora`."""

from pathlib import Path
from typing import Annotated

import typer

from diffsynth_cli.file_plans import (
    DryRun,
    FamilyName,
    LeaveKeysOut,
    OutputFormat,
    Overwrite,
    PlanFormat,
    carry_out,
)
from diffsynth_cli.options import SPELLINGS
from diffsynth_cli.text.wrapping import help_with_examples
from diffsynth_core.config.choices import LoraFormat

HELP = """Convert a LoRA to the key format of another program, with the same effect on the weights.

No base model is needed: family and format are inferred from the file. Separate LoRAs of q, k and v become one of a
higher rank where a program fuses these modules; everything else keeps its rank. Scales are kept as alphas, or
multiplied into lora_B where a program reads no alphas."""
"""Help text of the command."""
EXAMPLES = (
    "diffsynth convert-lora epoch-4.safetensors --to diffusers -o style.safetensors",
    "diffsynth convert-lora style.safetensors --to kohya -o style-kohya.safetensors --family flux2",
    "diffsynth convert-lora style.safetensors --to comfyui -o comfy.safetensors --check flux1-dev.safetensors",
)
"""Examples in the help text."""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "convert-lora", help=help_with_examples(HELP, *EXAMPLES), context_settings=SPELLINGS, no_args_is_help=True
    )(convert_lora)


def convert_lora(
    lora: Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA, in the format of any of these programs")],
    to: Annotated[LoraFormat, typer.Option("--to", help="Key format to write")],
    output_path: Annotated[Path, typer.Option("--output_path", "-o", metavar="OUT", help="Output file")],
    family: FamilyName = None,
    component: Annotated[
        str | None, typer.Option("--component", metavar="NAME", help="dit, or dit2: the second of two transformers")
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="BASE",
            help="Check that every key matches a module of the right shape in these weights: a file, a folder, a "
            "shard index, or model_id:glob",
        ),
    ] = None,
    allow_unmatched: LeaveKeysOut = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    output_format: OutputFormat = PlanFormat.TABLE,
) -> None:
    """Plan from names and shapes, then copy bytes."""
    from diffsynth_core.conversion.convert import plan_conversion
    from diffsynth_core.files import model_base_path

    plan = plan_conversion(lora, to, output_path, model_base_path(), family, component, check, allow_unmatched)
    carry_out(plan, overwrite, dry_run, output_format)
