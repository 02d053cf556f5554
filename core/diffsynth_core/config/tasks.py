"""The documented tasks: what each minimises, and which half of the road it goes. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What one value of `task` does.

    `encodes`: it reads the dataset, and makes of its samples what the encoders make of them.
    `trains`: it trains on that. The two halves of a road are two tasks, with a folder of encoded samples between them.
    """

    name: str
    objective: str
    encodes: bool = True
    trains: bool = True

    @property
    def first_half(self) -> str:
        """The task whose output is what the second half reads."""
        return f"{self.objective}:data_process"

    @property
    def second_half(self) -> str:
        """The task that reads what the first half writes."""
        return f"{self.objective}:train"


TASKS: dict[str, Task] = {
    task.name: task
    for objective in ("sft", "direct_distill")
    for task in (
        Task(objective, objective),
        Task(f"{objective}:data_process", objective, trains=False),
        Task(f"{objective}:train", objective, encodes=False),
    )
}
