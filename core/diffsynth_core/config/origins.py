"""Where the values of parameters come from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from diffsynth_core.config.recipes import Overrides

Kind = Literal["default", "recipe", "launcher", "config", "flag", "fit"]


@dataclass(frozen=True)
class Origin:
    """Where the value of a parameter comes from.

    Attributes:
        source: the recipe, file or flag, for messages.
        stage: the stage whose values it is one of; None: those for all stages.
        rank: higher for sources that take precedence.
    """

    kind: Kind
    source: str
    stage: str | None = None
    rank: int = -1

    @property
    def is_given(self) -> bool:
        """Whether a flag, a file or a recipe sets the value, possibly to its default."""
        return self.kind != "default"

    def __str__(self) -> str:
        return f"{self.source}, stage `{self.stage}`" if self.stage else self.source


DEFAULT = Origin("default", "the default")


class Stated(NamedTuple):
    """A value that a launcher states for a parameter, as its configuration writes it; `source`: that, for messages."""

    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class Source:
    """The values of a recipe's or config file's layer, or of the command line."""

    origin: Origin
    values: Overrides

    def levels(self, stage: str | None) -> Iterator[tuple[Origin, Mapping[str, Any]]]:
        """Yield the values for all stages, then those of one, which take precedence."""
        yield self.origin, self.values.parameters
        if stage:
            yield replace(self.origin, stage=stage, rank=self.origin.rank + 1), self.values.stages.get(stage, {})


def rank_sources(sources: Sequence[tuple[Kind, str, Overrides]]) -> list[Source]:
    """Return sources of a kind, a name and values, given by increasing precedence."""
    return [Source(Origin(kind, name, rank=2 * rank), values) for rank, (kind, name, values) in enumerate(sources)]


def levels_of(sources: Sequence[Source], stage: str | None) -> Iterator[tuple[Origin, Mapping[str, Any]]]:
    """Yield the values of all sources by increasing precedence."""
    for source in sources:
        yield from source.levels(stage)


def merge(sources: Sequence[Source], stage: str | None) -> tuple[dict[str, Any], dict[str, Origin]]:
    """Return the values of all sources, later ones overriding earlier ones, and the origin of each."""
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for origin, level in levels_of(sources, stage):
        for name, value in level.items():
            values[name] = value
            origins[name] = replace(origin, source=f"`--{name}`", stage=None) if origin.kind == "flag" else origin
    return values, origins
