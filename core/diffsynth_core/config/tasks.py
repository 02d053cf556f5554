"""The tasks: the objective of each, and which stages of two-stage training it performs. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What one value of `task` does.

    Two-stage training consists of a precompute task and a train task, with a folder of encoded samples between them.

    Attributes:
        objective: what training minimizes.
        columns: metadata columns that the objective requires, besides those of the model.
        encodes: whether the task reads a dataset and encodes its samples.
        trains: whether the task trains on encoded samples.
    """

    name: str
    objective: str
    columns: tuple[str, ...] = ()
    encodes: bool = True
    trains: bool = True

    @property
    def precompute_task(self) -> str:
        """Name of the task whose output the train task reads."""
        return f"{self.objective}:data_process"

    @property
    def train_task(self) -> str:
        """Name of the task that reads the output of the precompute task."""
        return f"{self.objective}:train"


OBJECTIVES: dict[str, tuple[str, ...]] = {
    "sft": (),
    "direct_distill": ("seed", "rand_device", "num_inference_steps", "cfg_scale"),
}
"""Objective -> metadata columns that it requires."""

TASKS: dict[str, Task] = {
    task.name: task
    for objective, columns in OBJECTIVES.items()
    for task in (
        Task(objective, objective, columns),
        Task(f"{objective}:data_process", objective, columns, trains=False),
        Task(f"{objective}:train", objective, columns, encodes=False),
    )
}
"""Name -> task."""
