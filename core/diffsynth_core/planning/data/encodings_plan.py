"""Which encodings a run needs, and which of them are cached. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from diffsynth_core.data.cache import EncodingCache
from diffsynth_core.models.spec import EncoderFacts


class EncodingRef(NamedTuple):
    """An encoding of a sample, by index: that of one of its captions (`Sample.choices`)."""

    sample: int
    choice: int = 0


@dataclass(frozen=True)
class EncoderPlan:
    """One encoder in a run.

    Attributes:
        online: its component trains, so its output is computed in every step. Otherwise `keys` are the cache entries
            of the needed encodings, and `missing` those to encode, some of which exist but are `damaged`: of encodings
            with the same entry, such as those of one caption of several samples, the first alone. A precompute task
            writes into its own folder, and copies what the cache already has.
        reads_text: it encodes each caption of a sample; others have the choice 0 alone.
    """

    encoder: EncoderFacts
    online: bool
    cache: EncodingCache
    keys: Mapping[EncodingRef, str]
    missing: tuple[EncodingRef, ...]
    damaged: tuple[EncodingRef, ...] = ()
    reads_text: bool = False

    def key(self, sample: int, choice: int = 0) -> str:
        """Return the cache entry of a sample with one of its captions."""
        return self.keys[EncodingRef(sample, choice if self.reads_text else 0)]


@dataclass(frozen=True)
class EncodingsPlan:
    """All encoders of a run, and the identity of each component's files (sha256 by component and file).

    Versions of libraries are not part of a cache key: an update encodes nothing again.
    """

    encoders: tuple[EncoderPlan, ...]
    identities: Mapping[str, Mapping[str, str]]

    @property
    def components_to_load(self) -> tuple[str, ...]:
        """Frozen components that must be loaded to encode."""
        return tuple(dict.fromkeys(part.encoder.component for part in self.encoders if part.missing))
