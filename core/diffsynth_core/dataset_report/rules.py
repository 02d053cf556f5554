"""What a dataset is checked against: thresholds, and what the family asks. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffsynth_core.config.parameters import SETTINGS, Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.data.images import SizeRule
from diffsynth_core.data.media import MediaRule, ReferenceRule
from diffsynth_core.dataset_report.thresholds import GENERAL_FACTOR, Thresholds
from diffsynth_core.files import default_cache_path
from diffsynth_core.models.registry import FRAME_INPUTS, REFERENCE_COLUMNS
from diffsynth_core.models.spec import EncoderFacts, FamilyFacts, Variant
from diffsynth_core.models.token_counts import CaptionRule
from diffsynth_core.planning.dataset import column_hints, media_rule, reference_rules, shown_frames

TEXT_COLUMN = "prompt"
TARGET_COLUMNS = ("video", "image")
"""Without a recipe the first of them that the metadata has is what is trained on."""
MASK_COLUMNS = ("mask", "inpaint_mask", "controlnet_inpaint_mask")
"""Columns whose images say which pixels of the image trained on count."""


@dataclass(frozen=True)
class Rules:
    """All that a dataset is checked against.

    `target`: the column of what is trained on; None: the first of `TARGET_COLUMNS` that there is.
    `masks`: columns of masks. `other`: columns beside these that training reads.
    `batch_size`, `repeat`, `accumulation`: how batches, epochs and steps are made of the samples.
    `num_conditioning_frames`: latent frames that the model is given, as models/spec.py has them. `shown_frames`: extra
    inputs that show it frames of what is trained on, which it must learn to bring forth.
    `captions`: how they are read; None: by `Thresholds.max_tokens` alone. `encoders`: what is kept in the cache below
    `cache`; empty: unknown.
    `file_columns`: columns that hold files, where no kind of model tells what they are.
    `column_hints`: column -> what makes it be read, where this run does not.
    `recipe`: what the rules are named after, a recipe or file; None: general rules, which hold in every family.
    """

    thresholds: Thresholds = field(default_factory=Thresholds)
    text: str = TEXT_COLUMN
    target: str | None = None
    media: MediaRule = field(default_factory=lambda: MediaRule(_general_size()))
    references: tuple[ReferenceRule, ...] = ()
    masks: tuple[str, ...] = MASK_COLUMNS
    other: tuple[str, ...] = ()
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
    def kind(self) -> str:
        """What is trained on, as data/metadata.py names it."""
        return "video" if self.media.frames or self.target == "video" else "image"


@dataclass(frozen=True)
class Columns:
    """The columns of a dataset by what they hold, as `columns_of` settles them.

    `other` are read besides; `required` are those of them that must be there.
    """

    text: str
    target: str
    references: tuple[str, ...]
    masks: tuple[str, ...]
    other: tuple[str, ...]
    required: tuple[str, ...] = ()

    @property
    def media(self) -> tuple[str, ...]:
        """The columns that name files."""
        return self.target, *self.references, *self.masks

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that must be there."""
        return self.target, *self.references, self.text, *self.required

    @property
    def known(self) -> tuple[str, ...]:
        """The columns that mean something."""
        return self.text, *self.media, *self.other


def rules_of(
    parameters: Parameters, facts: FamilyFacts, variant: Variant, thresholds: Thresholds, recipe: str | None
) -> Rules:
    """The rules of a run: what its family, its kind of model and its parameters ask."""
    return Rules(
        thresholds=thresholds,
        text=facts.text_column,
        target=variant.target.column,
        media=media_rule(parameters, variant.target),
        references=reference_rules(parameters, variant),
        masks=(),
        other=TASKS[parameters.task].columns,
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


def columns_of(rules: Rules, present: tuple[str, ...]) -> Columns:
    """Which of the columns `present` hold what; those that the rules ask for are there even when absent."""
    if rules.recipe:
        references = tuple(dict.fromkeys(rule.column for rule in rules.references))
        return Columns(
            rules.text, rules.target or TARGET_COLUMNS[-1], references, rules.masks, rules.other, rules.other
        )
    target = rules.target or next((name for name in TARGET_COLUMNS if name in present), TARGET_COLUMNS[-1])
    shown = dict.fromkeys((*TARGET_COLUMNS, *REFERENCE_COLUMNS, *FRAME_INPUTS, *rules.file_columns))
    references = tuple(name for name in shown if name in present and name not in (target, *rules.masks))
    masks = tuple(name for name in rules.masks if name in present)
    every_task = tuple(dict.fromkeys(name for task in TASKS.values() for name in task.columns))
    return Columns(rules.text, target, references, masks, (*rules.other, *every_task))


def _general_size() -> SizeRule:
    return SizeRule(None, None, SETTINGS["max_pixels"].default, GENERAL_FACTOR)


def general_rules(parameters: Parameters, thresholds: Thresholds) -> Rules:
    """The rules that hold in every family, with what the parameters ask of them."""
    return Rules(
        thresholds=thresholds,
        media=MediaRule(SizeRule(parameters.height, parameters.width, parameters.max_pixels, GENERAL_FACTOR)),
        file_columns=parameters.data_file_keys,
        batch_size=parameters.batch_size,
        repeat=parameters.dataset_repeat,
        accumulation=parameters.gradient_accumulation_steps,
    )
