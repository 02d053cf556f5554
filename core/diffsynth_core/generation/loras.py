"""LoRAs while images are drawn: layers beside the weights, refilled where an image has other LoRAs or weights.

They are not merged: the storage of 8-bit floats would round most of a change away, and a grid exchanges weights without
loading the model again. Differences of whole tensors, which some files have too, are merged while loading.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffsynth_core.adapters.deltas import WeightDelta, add_deltas, module_delta, open_deltas
from diffsynth_core.adapters.lora import set_lora
from diffsynth_core.adapters.merge import Workspace, merge_rows
from diffsynth_core.models.loading import WeightChange
from diffsynth_core.models.prepare import FROZEN, ComponentSetup
from diffsynth_core.planning.drawing.jobs import AppliedLora, GenerationJob
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap


def lora_setup(jobs: Iterable[GenerationJob], component: str, public_keys: KeyMap = SAME_NAMES) -> ComponentSetup:
    """Return how a component is made so that it can carry the LoRAs of every job.

    The rank of a module is the largest sum of ranks in a job.
    """
    known: dict[int, Mapping[str, int]] = {}
    ranks: Counter[str] = Counter()
    for job in jobs:
        of_job: Counter[str] = Counter()
        for applied in _of(job.adapters, component):
            if id(applied.lora) not in known:  # each is read from the file
                known[id(applied.lora)] = applied.lora.ranks
            of_job.update(known[id(applied.lora)])
        ranks |= of_job
    return ComponentSetup(lora_modules=tuple(ranks), public_keys=public_keys, rank=dict(ranks)) if ranks else FROZEN


def set_loras(
    module: nn.Module, adapters: Sequence[AppliedLora], component: str, public_keys: KeyMap = SAME_NAMES
) -> None:
    """Set the LoRAs of a loaded component, made by `lora_setup`, to those of a job; none: it draws as without any.

    Raises:
        DiffSynthError: if a value in a file is not finite.
    """
    deltas: dict[str, list[WeightDelta]] = {}
    for applied in _of(adapters, component):
        for name, delta in _read(applied):
            deltas.setdefault(name, []).append(delta.scaled(applied.weight))
    set_lora(module, {name: add_deltas(found) for name, found in deltas.items()}, public_keys)


@contextmanager
def merged_differences(
    adapters: Sequence[AppliedLora], component: str, public_keys: KeyMap = SAME_NAMES
) -> Iterator[WeightChange | None]:
    """Yield what adds the full differences of LoRA files to the weights of a component while it is loaded; None if
    the files have none.
    """
    changing = [applied for applied in _of(adapters, component) if applied.lora.tensors]
    if not changing:
        yield None
        return
    with ExitStack() as files:
        opened = [
            (
                files.enter_context(
                    open_deltas(replace(applied.lora, modules={}, pairs={}), applied.shapes, public_keys)
                ),
                applied.weight,
            )
            for applied in changing
        ]

        def change(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
            found = [delta.scaled(weight) for deltas, weight in opened if (delta := deltas.of(name))]
            if not found:
                return value
            rows = value.reshape(value.shape[0], -1)
            return merge_rows(rows, add_deltas(found), dtype, Workspace())[0].reshape(value.shape)

        yield change


def _of(adapters: Iterable[AppliedLora], component: str) -> Iterator[AppliedLora]:
    return (applied for applied in adapters if applied.component == component)


def _read(applied: AppliedLora) -> Iterator[tuple[str, WeightDelta]]:
    """Yield the change of each public module by a LoRA of weight 1."""
    from safetensors import safe_open

    with safe_open(applied.lora.path, framework="pt", device="cpu") as stream:
        for name, lora in applied.lora.modules.items():
            yield name, module_delta(lora, stream)
