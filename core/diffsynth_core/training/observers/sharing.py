"""Where a run is copied while it goes on, so that it outlives its machine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffsynth_core.checkpoints.mirror import Mirror
from diffsynth_core.checkpoints.run_folder import RunRecord, folder_identity, read_record
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.hub.client import Hub, Repository, open_hub
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.observers.background import BackgroundObserver, Destination
from diffsynth_core.training.observers.model_card import SHEET, model_card, preview_sheet
from diffsynth_core.training.observers.observer import Observer
from diffsynth_core.training.pace import Pace

CARD = "README.md"
"""File of the model card in a repository."""


@dataclass(eq=False)
class MirroredRun(Destination):
    """The mirror of a run, which holds all that resuming needs."""

    mirror: Mirror
    folder: Path
    run: str
    """The `id` of the run."""

    def __post_init__(self) -> None:
        self._identity = folder_identity(self.folder)

    @property
    def title(self) -> str:
        return f"the mirror `{self.mirror.address}`"

    @property
    def by_hand(self) -> str:
        return f"copy `{self.folder}` there"

    def update(self) -> None:
        """Bring the mirror up to date.

        Raises:
            DiffSynthError: if the run's folder is gone, or another has taken its place.
        """
        if folder_identity(self.folder) != self._identity:
            raise DiffSynthError(f"`{self.folder}` was removed or renamed")
        self.mirror.update(self.folder, self.run)


@dataclass(eq=False)
class UploadedRun(Destination):
    """The repository of a run, with its checkpoints and a model card."""

    plan: RunPlan
    hub: Hub
    repository: Repository
    uploaded: set[str] = field(default_factory=set)
    """sha256 of the checkpoints that are there."""
    texts: dict[str, bytes] = field(default_factory=dict)
    """What was written there besides."""

    @property
    def title(self) -> str:
        return f"`{self.repository.name}` on {self.hub.title}"

    @property
    def by_hand(self) -> str:
        folder = self.plan.parameters.output_path
        record = read_record(folder)
        newest = [folder / saved.file for entry in record.checkpoints[-1:] for saved in entry.files] if record else []
        return " ".join(f"upload it with `{self.hub.upload_command(self.repository, path)}`" for path in newest)

    def update(self) -> None:
        """Add the checkpoints that are not there, and the card if it has changed, in one commit."""
        folder = self.plan.parameters.output_path
        record = read_record(folder)
        if record is None or not record.checkpoints:
            return
        new = [saved for entry in record.checkpoints for saved in entry.files if saved.sha256 not in self.uploaded]
        new = [saved for saved in new if (folder / saved.file).exists()]  # else the run has just deleted it
        sheet = preview_sheet(folder)
        texts = {CARD: model_card(self.plan, record, folder, bool(sheet)).encode()}
        if sheet:
            texts[SHEET] = sheet
        changed = {name: content for name, content in texts.items() if self.texts.get(name) != content}
        if new or changed:
            files = {saved.file: folder / saved.file for saved in new}
            message = f"Step {record.checkpoints[-1].step} of {record.total_steps}"
            self.hub.commit(self.repository, {**files, **changed}, message)
        self.uploaded |= {saved.sha256 for saved in new}
        self.texts = texts


def sharing_observers(
    plan: RunPlan, record: RunRecord, reporter: Reporter, pace: Pace, stop: StopRequest
) -> Sequence[Observer]:
    """Return what brings a run to other places, if it is to be anywhere else."""
    parameters = plan.parameters
    mirrors: list[Destination] = []
    uploads: list[Destination] = []
    if parameters.mirror:
        mirrors.append(MirroredRun(Mirror(parameters.mirror), parameters.output_path, record.id))
    if parameters.push_to_hub:
        uploads.append(UploadedRun(plan, open_hub(parameters.hub), Repository("model", parameters.push_to_hub)))
    if not (mirrors or uploads):
        return []

    def is_alone() -> bool:
        return record.status == "failed" and plan.machine.world_size > 1

    return [BackgroundObserver(mirrors, uploads, reporter, pace, stop, is_alone)]
