"""How programs name the tensors of LoRA files: prefix + module + ending, each independent of the others. No torch.

A LoRA is written in one of four formats, which fix all three (`LORA_FORMATS`); files with any other combination are
read too (`weights/lora_keys.py`).

Sources of the prefixes: sd-scripts and musubi-tuner (`lora_unet_`), VideoX-Fun (`lora_unet__`), OneTrainer
(`lora_transformer_`), LyCORIS and SimpleTuner (`lycoris_`), peft (`base_model.model.`), ComfyUI and ai-toolkit
(`diffusion_model.`), diffusers (`transformer.`), DiffSynth-Studio (none, `pipe.dit.`). Full differences (`.diff`,
`.diff_b`, `.diff_m`) are those of ModelTC/LightX2V, tools/extract.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

from diffsynth_core.config.choices import LoraFormat
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap, Shape

TRANSFORMER_PREFIXES = (
    *("transformer.", "diffusion_model.", "model.diffusion_model."),
    *("transformer.base_model.model.", "diffusion_model.base_model.model."),
    *("base_model.model.transformer.", "base_model.model.diffusion_model."),
    *("lora_unet_", "lora_unet__", "lora_transformer_", "lora_transformer__"),
)
"""Prefixes of keys that identify the transformer."""
PREFIXES = ("", "pipe.{component}.", "base_model.model.", "lycoris_", *TRANSFORMER_PREFIXES)
"""Prefixes that keys may have; `{component}` is the name of the component."""
TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder", "pipe.text_encoder")
"""Prefixes of keys of LoRAs of text encoders."""
PEFT_PREFIX = "base_model.model."
"""The prefix in files that peft itself writes, whose alphas are in another file, `adapter_config.json`."""

Role = Literal["A", "B", "alpha", "diff", "diff_b", "diff_m"]
"""What a key of a LoRA stores."""
ALPHA = ".alpha"
"""The ending of an alpha's key in all formats; a stored one is read in each."""
ENDINGS: Mapping[str, Role] = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ALPHA: "alpha",
}
"""Endings of the keys of a LoRA -> their role in it."""
DIFFERENCES: Mapping[str, tuple[Role, tuple[str, ...]]] = {
    ".diff": ("diff", ("weight", "scale", "gamma")),
    ".diff_b": ("diff_b", ("bias",)),
    ".diff_m": ("diff_m", ("modulation", "scale_shift_table")),
}
"""Endings of the keys of full differences -> their role, and the leaves of the tensors that they are added to."""

AlphaKeys = Literal["never", "kept", "always"]
"""Whether a format stores alphas: never, only those of the source file, or for each LoRA, as its readers expect."""


@dataclass(frozen=True)
class KeyFormat:
    """How one program names the keys of a LoRA: `prefix + module + ending`, with the dots of the module kept or not.

    `prefixes`: the first is written; a file with one of the others has this format too.
    `A`, `B`: the endings.
    """

    prefixes: tuple[str, ...]
    A: str
    B: str
    alpha: AlphaKeys = "never"
    underscored: bool = False


LORA_FORMATS: Mapping[LoraFormat, KeyFormat] = {
    "diffsynth": KeyFormat(("", "pipe.{component}."), ".lora_A.default.weight", ".lora_B.default.weight"),
    "diffusers": KeyFormat(("transformer.", ""), ".lora_A.weight", ".lora_B.weight"),
    "comfyui": KeyFormat(("diffusion_model.",), ".lora_A.weight", ".lora_B.weight", alpha="kept"),
    "kohya": KeyFormat(("lora_unet_",), ".lora_down.weight", ".lora_up.weight", alpha="always", underscored=True),
}
"""The supported formats."""


@dataclass(frozen=True)
class Vocabulary:
    """One set of names for the modules of a component.

    `title`: the formats that use these names.
    `names`: maps public names to these, which may be of several parts of a public module.
    `fused`: `names` maps these to public names instead, as one module here may fuse several public ones.
    """

    title: str
    names: KeyMap = SAME_NAMES
    fused: bool = False

    def parts(self, name: str) -> tuple[str, ...]:
        """The names here of a public module or tensor: one, or those of its parts; () if it has none."""
        return self._source(name) if self.fused else self._targets(name)

    def public(self, name: str) -> tuple[str, ...]:
        """The public modules or tensors that a name here belongs to."""
        return self._targets(name) if self.fused else self._source(name)

    def _targets(self, name: str) -> tuple[str, ...]:
        return self.names.to_targets(name) or ()

    def _source(self, name: str) -> tuple[str, ...]:
        source = self.names.to_source(name)
        return () if source is None else (source,)

    def shape(self, name: str, shapes: Mapping[str, Shape]) -> Shape:
        """The shape of a tensor, by its name here, given those of public tensors; () if they do not determine it."""
        public = self.public(name)
        if not public or any(not shapes.get(one) for one in public):
            return ()
        if self.fused:
            return self.names.fuse_shape(name, shapes)
        return self.names.split_shape(public[0], shapes[public[0]]).get(name, ())


@dataclass(frozen=True)
class LoraNaming:
    """How LoRA files name the modules of one component.

    `key_maps`: for formats with other module names: public names -> those there, which may be of parts of a module;
    None: the format has no names for this component.
    `fused`: for formats in which one module may fuse several public ones: names there -> public names.
    `modules`: public names of all modules that can have a LoRA, with `{}` for numbers.
    """

    component: str = "dit"
    key_maps: Mapping[LoraFormat, KeyMap | None] = field(default_factory=dict)
    fused: Mapping[LoraFormat, KeyMap] = field(default_factory=dict)
    modules: tuple[str, ...] = ()

    def known(self, lora_format: LoraFormat) -> bool:
        """Whether a format has names for the modules of this component."""
        return self.key_maps.get(lora_format, SAME_NAMES) is not None

    def written(self, lora_format: LoraFormat) -> bool:
        """Whether a format has separate names for the LoRA of each public module."""
        return self.known(lora_format) and lora_format not in self.fused

    def vocabulary(self, lora_format: LoraFormat) -> Vocabulary:
        """The names of a format.

        Raises:
            KeyError: when it has none.
        """
        fused = self.fused.get(lora_format)
        names = self.key_maps.get(lora_format, SAME_NAMES) if fused is None else fused
        if names is None:
            raise KeyError(lora_format)
        return Vocabulary(lora_format, names, fused is not None)

    @property
    def vocabularies(self) -> tuple[Vocabulary, ...]:
        """All that files may use, each once; the public names first."""
        found: dict[tuple[KeyMap, bool], Vocabulary] = {}
        for vocabulary in map(self.vocabulary, filter(self.known, LORA_FORMATS)):
            known = found.get((vocabulary.names, vocabulary.fused))
            title = f"{known.title}/{vocabulary.title}" if known else vocabulary.title
            found[vocabulary.names, vocabulary.fused] = replace(vocabulary, title=title)
        return tuple(found.values())

    def modules_met(self, keys: Iterable[str]) -> list[str]:
        """Public names of all modules that can have a LoRA, with the numbers that appear in `keys`."""
        numbers = sorted({number for key in keys for number in _NUMBER.findall(key)}, key=int)
        return [
            pattern.format(*chosen)
            for pattern in self.modules
            for chosen in product(numbers, repeat=pattern.count("{}"))
        ]


_NUMBER = re.compile(r"\d+")
DIT = LoraNaming()
"""Naming of a transformer without other vocabularies."""


@dataclass(frozen=True)
class LoraKeys:
    """The keys of one LoRA in a file; None for one that is missing."""

    A: str | None = None
    B: str | None = None
    alpha: str | None = None


def spell(module: str, lora_format: LoraFormat) -> str:
    """A module's name as the keys of a format contain it."""
    return underscored(module) if LORA_FORMATS[lora_format].underscored else module


def underscored(module: str) -> str:
    """A module's name with underscores in place of dots."""
    return module.replace(".", "_")


def keys_of_part(part: str, lora_format: LoraFormat) -> LoraKeys:
    """The keys of the LoRA of a module, given by its name in the format; that of an alpha even if not always stored."""
    written = LORA_FORMATS[lora_format]
    stem = written.prefixes[0] + spell(part, lora_format)
    return LoraKeys(stem + written.A, stem + written.B, None if written.alpha == "never" else stem + ALPHA)


def lora_keys(module: str, lora_format: LoraFormat, naming: LoraNaming = DIT) -> tuple[LoraKeys, ...]:
    """The keys under which a format stores the LoRA of `module` (its public name), for each of its parts there.

    `alpha` is given where the format's readers expect one; the others take alpha = rank where none is stored.
    """
    found = tuple(keys_of_part(part, lora_format) for part in naming.vocabulary(lora_format).parts(module))
    if LORA_FORMATS[lora_format].alpha == "always":
        return found
    return tuple(replace(keys, alpha=None) for keys in found)
