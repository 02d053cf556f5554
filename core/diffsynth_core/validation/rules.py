"""What a dataset is checked against: thresholds, and what the family asks. No torch.

`Thresholds` is the one declaration of the thresholds; the options of `diffsynth dataset validate` are made from it.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from diffsynth_core.config.parameters import SETTINGS, Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.data.media import MAX_UPSCALE, MIN_AREA_SHARE, MediaRule, ReferenceRule
from diffsynth_core.data.pictures import SizeRule
from diffsynth_core.errors import Problem, raise_if_any
from diffsynth_core.families.interface import EncoderFacts, FamilyFacts, Variant
from diffsynth_core.families.table import FRAME_INPUTS, REFERENCE_COLUMNS
from diffsynth_core.families.token_counts import CaptionRule
from diffsynth_core.files import default_cache_path
from diffsynth_core.planning.dataset import column_hints, media_rule, reference_rules, shown_frames

GENERAL_FACTOR = 16
"""Sides of what is trained on are multiples of it in every family there is."""
TEXT_COLUMN = "prompt"
TARGET_COLUMNS = ("video", "image")
"""Without a recipe the first of them that the metadata has is what is trained on."""
MASK_COLUMNS = ("mask", "inpaint_mask", "controlnet_inpaint_mask")
"""Columns whose pictures say which pixels of the picture trained on count."""


def _threshold(default: float, unit: str, help_text: str, least: float, most: float = math.inf) -> Any:
    """Declare one threshold, and the range of what makes sense."""
    return field(default=default, metadata={"unit": unit, "help": help_text, "least": least, "most": most})


def _out_of_range(threshold: Field[Any], value: float) -> Problem | None:
    least, most = threshold.metadata["least"], threshold.metadata["most"]
    if least <= value <= most:
        return None
    expected = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
    what = f"`--{threshold.name}` is {value:g}, expected {expected} ({threshold.metadata['unit']})"
    return Problem(what, "name a number of that range", wrong_use=True)


@dataclass(frozen=True)
class Thresholds:
    """Where a check begins to speak."""

    near_duplicate_distance: int = _threshold(
        3,
        "bits of 64",
        "Pictures whose difference hashes differ in at most so many bits are IMAGE_NEAR_DUPLICATE; -1: none",
        least=-1,
        most=64,
    )
    near_duplicate_colour: float = _threshold(
        12.0,
        "levels of 255",
        "Pictures whose colours, field by field of a grid of 8 x 8, differ by more on average are not near duplicates",
        least=0,
    )
    max_aspect: float = _threshold(
        4.0, "ratio", "The longer side of a picture by the shorter one, above which it is IMAGE_ASPECT", least=1
    )
    max_crop_loss: float = _threshold(
        0.2,
        "share",
        "The share of a picture or video that may be cut away before it is IMAGE_CROP_LOSS",
        least=0,
        most=1,
    )
    max_upscale: float = _threshold(
        MAX_UPSCALE,
        "factor",
        "Images and videos that are scaled up by more, to be trained on or shown, are IMAGE_UPSCALED",
        least=1,
    )
    min_area_share: float = _threshold(
        MIN_AREA_SHARE,
        "share",
        "Images and videos of a smaller share of the area that the model is usually trained at, or of `max_pixels` "
        "where that is less, are IMAGE_LOW_RESOLUTION; a fixed size and rules without a recipe know none",
        least=0,
        most=1,
    )
    min_side: int = _threshold(
        GENERAL_FACTOR, "pixels", "The least side of a picture or video; a shorter one is IMAGE_TOO_SMALL", least=1
    )
    max_tokens: int = _threshold(
        512,
        "tokens",
        "Captions of more are CAPTION_TOO_LONG; a recipe brings the number of its own text encoder",
        least=1,
    )
    file_timeout: float = _threshold(
        120.0, "seconds", "A file that takes longer is given up and told as unreadable", least=0.001
    )

    def __post_init__(self) -> None:
        """Raises: FaultsFound: for values out of their range; NaN is in none."""
        raise_if_any([problem for one in fields(self) if (problem := _out_of_range(one, getattr(self, one.name)))])


@dataclass(frozen=True)
class Rules:
    """All that a dataset is checked against.

    `target`: the column of what is trained on; None: the first of `TARGET_COLUMNS` that there is.
    `masks`: columns of masks. `other`: columns beside these that training reads.
    `batch_size`, `repeat`, `accumulation`: how batches, epochs and steps are made of the samples.
    `given_frames`: latent frames that the model is given, as families/interface.py has them. `shown_frames`: extra
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
    given_frames: int = 0
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
        return "video" if self.media.frames or self.target == "video" else "picture"


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
        target=variant.medium.column,
        media=media_rule(parameters, variant.medium),
        references=reference_rules(parameters, variant),
        masks=(),
        other=TASKS[parameters.task].columns,
        batch_size=parameters.batch_size,
        repeat=parameters.dataset_repeat,
        accumulation=parameters.gradient_accumulation_steps,
        given_frames=variant.given_frames,
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


def threshold_facts() -> Mapping[str, tuple[Any, str, str]]:
    """Name -> (default, unit, help) of every threshold, for options and the reference page."""
    return {one.name: (one.default, one.metadata["unit"], one.metadata["help"]) for one in fields(Thresholds)}


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
