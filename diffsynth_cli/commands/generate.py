"""`diffsynth generate`."""

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsynth_cli.file_plans import OutputFormat, PlanFormat
from diffsynth_cli.options import BOTH_SPELLINGS, setting_option, unknown_options
from diffsynth_cli.printing import echo, echo_line
from diffsynth_cli.text.wrapping import help_with_examples
from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.errors import EXIT_DOES_NOT_FIT, raise_if_any
from diffsynth_core.models.registry import image_inputs

if TYPE_CHECKING:
    from diffsynth_cli.console import ConsoleReporter
    from diffsynth_core.drawing import Drawing

HELP = """Draw images, or clips of a video model, with the model of a recipe or of a run.

Image i of a command, counted from 0, uses the seed --seed + i, so that a command draws the same images every time.
What is not given is the documented default of the model. Images are written as PNG and clips as MP4, with their
parameters in the metadata, into a new folder; each is whole if the command is interrupted.

A LoRA is FILE or FILE:WEIGHT. With --grid, one LoRA may have several weights, FILE:0,0.5,1: the columns of a sheet
whose rows are the prompts; images of a row have one seed. --run takes model, last checkpoint and captions from the
folder of a run, and with --grid draws all of its checkpoints side by side.

Exit codes: 0 success, 1 failure or problems found, 2 incorrect usage, 130, 143 or 129 stopped by a signal; with
--dry_run also 3: the weights do not fit in --gpu_memory."""
"""Help text of the command."""
EXAMPLES = (
    "diffsynth generate --recipe qwen-image-lora --lora style.safetensors:0.8 --prompt 'a lighthouse at night'",
    "diffsynth generate --recipe qwen-image-edit-2509-lora --prompt 'add a red hat' --edit_image cat.png",
    "diffsynth generate --recipe wan2.1-t2v-1.3b-lora --prompts prompts.txt --num_frames 33 --out clips",
    "diffsynth generate --recipe qwen-image-lora --lora style.safetensors:0,0.5,1 --prompts prompts.txt --grid",
    "diffsynth generate --run models/train/qwen-image-lora --grid",
    "diffsynth generate --run models/train/qwen-image-lora --dry_run",
)
"""Examples in the help text."""
HELP_TEXTS = {
    "seed": "Seed of the noise of the first image; the next ones use the seeds after it; default: 0",
    "height": "Height in pixels, set together with `width`; default: as documented for the model",
    "width": "Width in pixels, set together with `height`; default: as documented for the model",
    "max_pixels": "Maximum area of reference images; larger ones are scaled down to it",
    "num_frames": "Frames of a clip, of the form 4n + 1; default: as documented for the model",
    "dry_run": "Check everything, print what would be drawn, and exit before loading any weights",
    "gpu_memory": "Memory of the target GPU, such as 24GB, or its name, such as 4090; --dry_run reports whether the "
    "weights fit",
}
"""Parameter -> what it does here, where that is not what it does in training."""
OWN_OPTIONS = ("prompt", "prompts", "negative_prompt", "steps", "cfg_scale", "guidance", "lora", "lora_dit2", "checkpoint", "run",
               "grid", "out", "format")  # fmt: skip
"""Those that are neither parameters nor images."""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("generate", help=help_with_examples(HELP, *EXAMPLES), context_settings=BOTH_SPELLINGS)(_with_options())


def generate(
    context: typer.Context,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="A prompt; repeatable")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts: .txt with one per line; or .csv, .json or .jsonl with the column `prompt` and, if wanted, "
            "`negative_prompt`, `seed` and columns of images, whose paths are relative to the file",
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative_prompt", metavar="TEXT", help="What classifier-free guidance avoids")
    ] = None,
    steps: Annotated[str | None, typer.Option("--steps", metavar="INTEGER", help="Sampling steps")] = None,
    cfg_scale: Annotated[
        str | None,
        typer.Option(
            "--cfg_scale", metavar="NUMBER", help="Scale of classifier-free guidance; 1: none, which is twice as fast"
        ),
    ] = None,
    guidance: Annotated[
        str | None,
        typer.Option("--guidance", metavar="NUMBER", help="Guidance of guidance-distilled models such as FLUX.1"),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option("--lora", metavar="FILE[:WEIGHT]", help="A LoRA, in any format; repeatable")
    ] = None,
    lora_dit2: Annotated[
        list[str] | None,
        typer.Option(
            "--lora_dit2",
            metavar="FILE[:WEIGHT]",
            help="A LoRA of the second of two transformers (the low-noise one of Wan 2.2 A14B); repeatable",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint", metavar="PATH", help="Full weights of one component, in place of those of the recipe or run"
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="DIR",
            help="Folder of a run: its model and last checkpoint, and the first 4 captions of its dataset unless "
            "prompts are given",
        ),
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Draw a sheet too: prompts x weights, or prompts x checkpoints of the run")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Output folder, new or empty; default: `generated/<recipe or run>`"),
    ] = None,
    output_format: OutputFormat = PlanFormat.TABLE,
    **values: Any,
) -> int:
    """Draw images, or print what would be drawn.

    `values`: those of parameters and the images by extra input; None: not given.
    """
    from diffsynth_cli.console import ConsoleReporter
    from diffsynth_core.drawing import Drawing
    from diffsynth_core.generation.request import GenerationRequest, find_source

    raise_if_any(unknown_options(context.args, _known(), "generate", "is an option of `train` that `generate` lacks"))
    images = {name: tuple(files) for name in image_inputs() if (files := values.pop(name))}
    request = GenerationRequest(
        prompts=tuple(prompt or ()),
        prompts_file=prompts,
        negative_prompt=negative_prompt,
        steps=steps,
        cfg_scale=cfg_scale,
        guidance=guidance,
        images=images,
        loras=tuple(lora or ()),
        second_loras=tuple(lora_dit2 or ()),
        checkpoint=checkpoint,
        run=run,
        out=out,
        grid=grid,
    )
    source = find_source(request, {name: value for name, value in values.items() if value is not None})
    reporter = ConsoleReporter()
    drawing = Drawing(source, request, reporter)
    if source.resolved.parameters.dry_run:
        return _show_plan(drawing, output_format)
    return _draw(drawing, reporter, output_format)


def _known() -> list[str]:
    return [*(name for name, setting in SETTINGS.items() if setting.generates), *image_inputs(), *OWN_OPTIONS]


def _with_options() -> Any:
    """The command with an option for each parameter that drawing has too, and for each image, in place of
    `**values`."""
    signature = inspect.signature(generate)
    fixed = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    annotations: dict[str, Any] = {
        name: Annotated[
            list[Path] | None,
            typer.Option(f"--{name}", metavar="FILE", help=f"Image for the model input `{name}`; repeatable"),
        ]
        for name in image_inputs()
    }
    annotations |= {
        name: setting_option(setting, HELP_TEXTS.get(name)) for name, setting in SETTINGS.items() if setting.generates
    }
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in annotations.items()
    ]

    def command(**given: Any) -> int:
        return generate(**given)

    command.__signature__ = inspect.Signature([*fixed, *options])  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in (*fixed, *options)}
    return command


def _show_plan(drawing: "Drawing", output_format: PlanFormat) -> int:
    """Print what would be drawn; returns the exit code."""
    from diffsynth_cli.errors import exit_code_of
    from diffsynth_cli.text.generation import image_facts, plan_lines
    from diffsynth_cli.text.wrapping import terminal_width, wrap_line
    from diffsynth_core.errors import FaultsFound
    from diffsynth_core.generation.memory import weights_fit
    from diffsynth_core.hub.client import downloads_disabled
    from diffsynth_core.hub.model_files import MissingFiles

    generation = drawing.plan(without_files=True)
    lacking = [
        problem for problem in generation.missing if downloads_disabled() or not isinstance(problem, MissingFiles)
    ]
    code = exit_code_of(FaultsFound(lacking)) if lacking else 0
    if output_format is PlanFormat.JSON:
        echo(json.dumps({"written": False, **image_facts(generation)}, indent=2))
    else:
        for line in plan_lines(generation):
            echo_line(wrap_line(line, terminal_width()))
    return code or (0 if weights_fit(generation) else EXIT_DOES_NOT_FIT)


def _draw(drawing: "Drawing", reporter: "ConsoleReporter", output_format: PlanFormat) -> int:
    from diffsynth_cli.streams import stdout_as_messages
    from diffsynth_cli.text.download import plan_lines as download_lines
    from diffsynth_cli.text.generation import image_facts, plan_lines
    from diffsynth_core.hub.download_plan import DownloadPlan
    from diffsynth_core.stop import listen_for_stop

    def show(download: DownloadPlan) -> None:
        for line in download_lines(download):
            reporter.info(line)

    written = []
    with stdout_as_messages():
        drawing.download(show)
        generation = drawing.plan()
        for line in plan_lines(generation):
            reporter.info(line)
        with listen_for_stop(reporter.info) as stop:
            for path in drawing.draw(generation, stop):
                written.append(path)
                if output_format is PlanFormat.TABLE:
                    reporter.result(str(path))
    if output_format is PlanFormat.JSON:
        echo(json.dumps({"written": True, **image_facts(generation)}, indent=2))
    return 0
