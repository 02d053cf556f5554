"""`diffsynth train`."""

from typing import Any

import typer

from diffsynth_cli.options import BOTH_SPELLINGS, GroupedHelp, with_setting_options
from diffsynth_cli.text.wrapping import help_with_examples
from diffsynth_core.config.resolve import resolve_stages

HELP = """Train from a recipe: LoRA, full, or both.

Every flag can be written with underscores or dashes; flags override --config, which overrides the recipe,
which overrides the defaults.

Exit codes: 0 success or stopped by --max_time, 1 failure or problems found, 2 incorrect usage, 130, 143 or 129 stopped
by a signal; with --dry_run or --fit also 3: the run does not fit in --gpu_memory."""
"""Help text of the command."""
EXAMPLES = (
    "diffsynth train --recipe qwen-image-lora --rehearse",
    "diffsynth train --recipe qwen-image-lora --dataset_base_path data/mine",
    "diffsynth train --recipe qwen-image-lora --dataset_base_path data/mine --resume auto",
    "diffsynth train --recipe qwen-image-lora --dataset_base_path data/mine --num_processes 4",
    "diffsynth train --recipe wan2.2-t2v-a14b-lora --dataset_base_path data/clips --only high --dry_run",
)
"""Examples in the help text."""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("train", cls=GroupedHelp, help=help_with_examples(HELP, *EXAMPLES), context_settings=BOTH_SPELLINGS)(
        with_setting_options(train)
    )


def train(context: typer.Context, flags: dict[str, Any]) -> int:
    """Resolve, plan, and carry out what the flags ask for."""
    stages = resolve_stages(flags, context.args)
    from diffsynth_cli.train_session import run_session

    return run_session(stages, flags)
