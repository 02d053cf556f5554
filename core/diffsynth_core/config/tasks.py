"""The documented tasks: what each minimises, and which half of the road it goes. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What one value of `task` does.

    `encodes`: it reads the dataset, and makes of its samples what the encoders make of them. `trains`: it trains on
    that. The two halves of a road are two tasks, with a folder of encoded samples between them.
    `columns`: metadata columns that its objective reads of each sample, besides those of the model.
    """

    name: str
    objective: str
    columns: tuple[str, ...] = ()
    encodes: bool = True
    trains: bool = True

    @property
    def precompute_task(self) -> str:
        """The task whose output is what the second half reads."""
        return f"{self.objective}:data_process"

    @property
    def train_task(self) -> str:
        """The task that reads what the first half writes."""
        return f"{self.objective}:train"


OBJECTIVES: dict[str, tuple[str, ...]] = {
    "sft": (),
    "direct_distill": ("seed", "rand_device", "num_inference_steps", "cfg_scale"),
}
"""Objective -> the metadata columns that it reads."""

TASKS: dict[str, Task] = {
    task.name: task
    for objective, columns in OBJECTIVES.items()
    for task in (
        Task(objective, objective, columns),
        Task(f"{objective}:data_process", objective, columns, trains=False),
        Task(f"{objective}:train", objective, columns, encodes=False),
    )
}
