"""The images of one command: planned, with missing model files downloaded, then drawn and written one by one.

The command line is one user of it, and a notebook another:

    from diffsynth_core.drawing import Drawing
    from diffsynth_core.generation.request import GenerationRequest

    drawing = Drawing.of(GenerationRequest(prompts=("a red circle",), loras=("style.safetensors:0.8",)),
                         recipe="qwen-image-lora")
    drawing.download()
    for path in drawing.draw():
        print(path)
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth_core.errors import SIGNAL_EXIT_BASE, Interrupted, truncate
from diffsynth_core.files import model_base_path
from diffsynth_core.generation.request import GenerationRequest, ModelSource, find_source
from diffsynth_core.hub.download import download_missing
from diffsynth_core.hub.download_plan import DownloadPlan
from diffsynth_core.progress import Reporter, SilentReporter, pluralize

if TYPE_CHECKING:
    from diffsynth_core.generation.plan import Generation
    from diffsynth_core.stop import StopRequest


class Drawing:
    """What one `generate` command draws."""

    def __init__(self, source: ModelSource, request: GenerationRequest, reporter: Reporter | None = None) -> None:
        self.source, self.request = source, request
        self.reporter: Reporter = reporter or SilentReporter()

    @classmethod
    def of(cls, request: GenerationRequest, reporter: Reporter | None = None, **parameters: Any) -> "Drawing":
        """Return the drawing of a request with these parameters; `recipe` and `config` among them.

        Raises:
            DiffSynthError: if the folder of a run is not one.
        """
        return cls(find_source(request, parameters), request, reporter)

    def plan(self, without_files: bool = False) -> "Generation":
        """Plan all images.

        Args:
            without_files: list missing model files and device in the plan instead of raising.

        Raises:
            FaultsFound: with all problems.
        """
        from diffsynth_core.generation.plan import plan_generation

        return plan_generation(self.source, self.request, self._models(), without_files)

    def download(self, show: Callable[[DownloadPlan], None] = lambda _: None) -> None:
        """Download missing model files, once everything else has been checked.

        Args:
            show: called with the list of files before anything is downloaded.

        Raises:
            FaultsFound: with all problems, missing files included, if there are others; or if a download fails.
            Interrupted: after Ctrl-C; the downloaded parts are kept.
        """
        from diffsynth_core.generation.plan import files_to_download

        if not self.source.resolved.incomplete:
            base = self._models()
            wanted = files_to_download(self.source, self.request, base)
            download_missing(wanted, base, self.plan, self.reporter, self.reporter, show)

    def draw(self, generation: "Generation | None" = None, stop: "StopRequest | None" = None) -> Iterator[Path]:
        """Draw all images and yield the path of each once it is written; of a grid last.

        Args:
            generation: of `plan`; None: plan now.
            stop: set by a signal.

        Raises:
            FaultsFound: as `plan`.
            Interrupted: after a stop; the images so far are whole.
        """
        from diffsynth_core.stop import StopRequest

        generation = self.plan() if generation is None else generation
        written = 0
        try:
            for path in self._draw(generation, StopRequest() if stop is None else stop):
                written += 1
                yield path
        except Interrupted as error:
            signal = error.exit_code - SIGNAL_EXIT_BASE
            count = pluralize(generation.count, "image")
            what = f"interrupted; {written} of {count} {'is' if written == 1 else 'are'} in `{generation.out}`"
            raise Interrupted(signal, what if written else "interrupted; no image was drawn") from error

    def _draw(self, generation: "Generation", stop: "StopRequest") -> Iterator[Path]:
        from diffsynth_core.generation.generate import generate
        from diffsynth_core.generation.grid import draw_grid, middle_frame
        from diffsynth_core.generation.labels import choose_font
        from diffsynth_core.generation.outputs import FileFacts, details, parameter_text, save_pixels, save_png

        cells = {}
        for plan, images in zip(generation.plans, generation.images, strict=True):
            title, fps = plan.model.variant.title, plan.model.variant.sampling.fps
            files = None
            for (job, pixels), image in zip(generate(plan, self.reporter, stop), images, strict=True):
                # Only now: encoding has hashed the files of the encoders.
                files = files or FileFacts(plan, self.reporter)
                text = parameter_text(job, title)
                save_pixels(image.path, pixels, fps, text, details(job, plan, files))
                if generation.sheet:
                    cells[image.row, image.column] = middle_frame(pixels)
                yield image.path
        if generation.sheet:
            sheet = generation.sheet
            labels = choose_font((*sheet.rows, *sheet.columns))
            if labels.missing:
                self.reporter.warn(
                    f"no font here has {pluralize(len(labels.missing), 'character')} of the labels "
                    f"(`{truncate(''.join(labels.missing), 20)}`); the grid has notes such as `[2 characters]` instead. "
                    "A font such as Noto Sans CJK, once installed, is used"
                )
            save_png(sheet.path, draw_grid(sheet.rows, sheet.columns, cells, labels), {})
            yield sheet.path

    def _models(self) -> Path:
        """Return the folder of downloaded models; of a rehearsal that of its tiny ones."""
        record = self.source.record
        if record is None or not record.parameters.get("rehearse"):
            return model_base_path()
        from diffsynth_core.rehearsal.preparation import models_folder

        return models_folder(self.source.resolved.parameters, record.family)
