"""Rules of the checks: thresholds, and the requirements of the run. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffsynth_core.config.parameters import SETTINGS, Parameters
from diffsynth_core.data.conditions import Columns, Condition
from diffsynth_core.data.images import SizeRule
from diffsynth_core.data.media import MediaRule
from diffsynth_core.dataset_report.thresholds import GENERAL_FACTOR, Thresholds
from diffsynth_core.files import default_cache_path
from diffsynth_core.models.dataset_columns import (
    TARGET_COLUMNS,
    TEXT_COLUMN,
    column_hints,
    columns_of_run,
    general_columns,
    media_rule,
    shown_frames,
)
from diffsynth_core.models.spec import EncoderFacts, FamilyFacts, Variant
from diffsynth_core.models.token_counts import CaptionRule


@dataclass(frozen=True)
class Rules:
    """Everything that a dataset is checked against.

    Attributes:
        media: how the target is read.
        columns: columns that a run reads; None: recognized by name.
        batch_size, repeat, accumulation: how samples form batches, epochs and steps.
        num_conditioning_frames: latent frames that stay clean; see models/spec.py.
        shown_frames: extra inputs that make frames of the target a condition.
        captions: how they are read; None: checked by `Thresholds.max_tokens` only.
        encoders: encoders whose output is in the cache below `cache`; empty: unknown.
        file_columns: columns with file names, if there is no model.
        column_hints: column -> how to make a run read it, if this one does not.
        recipe: name of the rules, a recipe or file; None: general rules for all families.
    """

    thresholds: Thresholds = field(default_factory=Thresholds)
    media: MediaRule = field(
        default_factory=lambda: MediaRule(SizeRule(None, None, SETTINGS["max_pixels"].default, GENERAL_FACTOR))
    )
    columns: Columns | None = None
    batch_size: int = 1
    repeat: int = 1
    accumulation: int = 1
    num_conditioning_frames: int = 0
    shown_frames: tuple[str, ...] = ()
    captions: CaptionRule | None = None
    encoders: tuple[EncoderFacts, ...] = ()
    cache: Path | None = None
    file_columns: tuple[str, ...] = ()
    column_hints: Mapping[str, str] = field(default_factory=dict)
    recipe: str | None = None
    family: str | None = None

    @property
    def text(self) -> str:
        """Column of captions."""
        return self.columns.text if self.columns else TEXT_COLUMN

    @property
    def target(self) -> str:
        """Column of the target, if there is no metadata file."""
        return self.columns.target if self.columns else TARGET_COLUMNS[-1]

    @property
    def kind(self) -> str:
        """Type of the target, as in data/metadata.py."""
        return "video" if self.media.frames or self.target == "video" else "image"

    @property
    def sized_conditions(self) -> tuple[Condition, ...]:
        """Conditions of the run; empty without a model, which determines their sizes."""
        return self.columns.conditions if self.columns else ()

    def columns_among(self, present: Sequence[str]) -> Columns:
        """Return the columns that are read; without a model, by the names of those that are `present`."""
        return self.columns or general_columns(present, self.file_columns)


def rules_of(
    parameters: Parameters, facts: FamilyFacts, variant: Variant, thresholds: Thresholds, recipe: str | None
) -> Rules:
    """Return the rules of a run: the requirements of its family, variant and parameters."""
    return Rules(
        thresholds=thresholds,
        media=media_rule(parameters, variant.target),
        columns=columns_of_run(parameters, facts, variant),
        batch_size=parameters.batch_size,
        repeat=parameters.dataset_repeat,
        accumulation=parameters.gradient_accumulation_steps,
        num_conditioning_frames=variant.num_conditioning_frames,
        shown_frames=shown_frames(parameters, variant),
        encoders=variant.encoders,
        cache=parameters.cache_path or default_cache_path(),
        column_hints=column_hints(parameters, facts, variant),
        recipe=recipe,
        family=facts.name,
    )


def general_rules(parameters: Parameters, thresholds: Thresholds) -> Rules:
    """Return the rules that apply to all families, with the requirements of the parameters."""
    return Rules(
        thresholds=thresholds,
        media=MediaRule(SizeRule(parameters.height, parameters.width, parameters.max_pixels, GENERAL_FACTOR)),
        file_columns=parameters.data_file_keys,
        batch_size=parameters.batch_size,
        repeat=parameters.dataset_repeat,
        accumulation=parameters.gradient_accumulation_steps,
    )
