"""Table of the samplers of training timesteps: each is a pure function of the key of a sample's draw."""

from collections.abc import Callable
from dataclasses import dataclass

from diffsynth_core.config.choices import TRAINING_TIMESTEPS
from diffsynth_core.randomness import key_of

DrawKey = tuple[int, int, int, int]
"""(seed, epoch, sample, repeat): all that the random numbers of one draw of a sample depend on."""


@dataclass(frozen=True)
class Band:
    """One of `count` equal parts of the timesteps to train on, of which 0 is the noisiest."""

    number: int
    count: int

    def of(self, indices: range) -> range:
        """Return its part of the indices; not empty if there are at least `count` of them."""
        return indices[len(indices) * self.number // self.count : len(indices) * (self.number + 1) // self.count]


TimestepSampler = Callable[[DrawKey, range], int]
"""(key, indices into the table of sigmas, of which 0 is the noisiest) -> one of the indices."""


def timestep_range(low: float, high: float) -> range:
    """Return the indices between two fractions of the table: [floor(1000 low), floor(1000 high))."""
    return range(int(low * TRAINING_TIMESTEPS), int(high * TRAINING_TIMESTEPS))


def draw_uniform(key: DrawKey, indices: range) -> int:
    """Draw each index with the same probability."""
    return indices[key_of("timestep", *key) * len(indices) // 2**64]


TIMESTEPS: dict[str, TimestepSampler] = {"uniform": draw_uniform}
"""Name -> sampler."""
