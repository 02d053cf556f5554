"""The loss on held-out samples, at fixed noise and timesteps, so that it compares between steps and runs."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch

from diffsynth_core.data.batches import SampleRef
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.planning.training.validation import count_bands, held_out_batches
from diffsynth_core.training.engines.engine import Engine
from diffsynth_core.training.loader import MicroBatch, MicroBatches
from diffsynth_core.training.observers.observer import ValidationReport
from diffsynth_core.training.timesteps import Band

VALIDATION_EPOCH = -1
"""Epoch of the draws for validation, which no step has: they are functions of seed, held-out sample and band alone."""


class Validation:
    """Measures the loss on the held-out samples of a plan; all processes call it together."""

    def __init__(self, plan: RunPlan, engine: Engine, process: int, device: torch.device) -> None:
        """`process`: the number of this process, whose `device` it is."""
        self._engine, self._device = engine, device
        self._at_once, self._share = plan.machine.data_parallel, plan.machine.share(process)
        self._counts = plan.machine.counts(process)
        self._of_averages = plan.parameters.evaluate_ema
        self._bands = count_bands(plan.parameters)
        self._batches = held_out_batches(plan)
        self._micro_batches = MicroBatches(plan, room=0)
        # Draws are by the place among the held-out samples: the same ones compare between runs on other datasets.
        self._places = {sample: place for place, sample in enumerate(plan.data.held_out)}

    def measure(self, step: int) -> ValidationReport:
        """Return the mean loss after `step` steps, the same in all processes; that of the averaged weights with
        `evaluate_ema`.
        """
        with self._engine.averaged() if self._of_averages else nullcontext():
            losses = self._losses().double()
        return ValidationReport(step, float(losses.mean()), tuple(losses.mean(dim=1).tolist()))

    def _losses(self) -> torch.Tensor:
        """The loss of each held-out sample in each band, `[bands, samples]` float32 on the CPU.

        One process computes a loss, in the same micro-batch whatever their number, and the others add zero: so their
        number does not change it. Those that compute a sample together sum in another order.
        """
        losses = torch.zeros(self._bands, sum(map(len, self._batches)), device=self._device)
        for micro_batch, first in self._own():
            size = len(micro_batch.refs)
            numbers = tuple(self._places[ref.sample] for ref in micro_batch.refs)
            for number in range(self._bands):
                refs = tuple(SampleRef(ref.sample, number) for ref in micro_batch.refs)
                of_band = replace(micro_batch, refs=refs, band=Band(number, self._bands), numbers=numbers)
                measured = self._engine.evaluate(of_band)
                if micro_batch.counts and self._counts:
                    losses[number, first : first + size] = measured
        return self._engine.sum_over_processes(losses).cpu()

    def _own(self) -> Iterator[tuple[MicroBatch, int]]:
        """Yield the micro-batches of this process, each with the place of its first sample.

        Every process gets as many: where none is left, the first is a stand-in that does not count.
        """
        for start in range(0, len(self._batches), self._at_once):
            own = start + self._share
            is_left = own < len(self._batches)
            number = own if is_left else 0
            refs = [SampleRef(sample, 0) for sample in self._batches[number]]
            micro_batch = self._micro_batches.load(VALIDATION_EPOCH, refs, [0] * len(refs), is_left)
            yield micro_batch, sum(map(len, self._batches[:number]))
