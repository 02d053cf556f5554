"""How LoRA files name their tensors: prefix + module + ending, each independent of the others. No torch.

A key is read with any known prefix, any known ending, and the module named in any vocabulary of its family, dotted or
with underscores (`find_lora_keys`). It is written in one of four dialects, which fix all three (`DIALECTS`).

Sources of the prefixes: sd-scripts and musubi-tuner (`lora_unet_`), VideoX-Fun (`lora_unet__`), OneTrainer
(`lora_transformer_`), LyCORIS and SimpleTuner (`lycoris_`), peft (`base_model.model.`), ComfyUI and ai-toolkit
(`diffusion_model.`), diffusers (`transformer.`), DiffSynth-Studio (none, `pipe.dit.`). Whole differences (`.diff`,
`.diff_b`, `.diff_m`) are those of ModelTC/LightX2V, tools/extract.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal, NamedTuple

from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap, Shape

TRANSFORMER_PREFIXES = (
    *("transformer.", "diffusion_model.", "model.diffusion_model."),
    *("transformer.base_model.model.", "diffusion_model.base_model.model."),
    *("base_model.model.transformer.", "base_model.model.diffusion_model."),
    *("lora_unet_", "lora_unet__", "lora_transformer_", "lora_transformer__"),
)
"""How keys begin that say of themselves that they are the transformer's."""
PREFIXES = ("", "pipe.{component}.", "base_model.model.", "lycoris_", *TRANSFORMER_PREFIXES)
"""How keys may begin; `{component}` stands for the name of the component."""
PEFT_PREFIX = "base_model.model."
"""How keys begin in files that peft itself writes, whose alphas stand in another file, `adapter_config.json`."""

Role = Literal["down", "up", "alpha", "diff", "diff_b", "diff_m"]
ALPHA = ".alpha"
"""How the key of an alpha ends, in all dialects; one that is there is read in each."""
ENDINGS: Mapping[str, Role] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ALPHA: "alpha",
}
"""How keys of a LoRA end -> what they are of it."""
DIFFERENCES: Mapping[str, tuple[Role, tuple[str, ...]]] = {
    ".diff": ("diff", ("weight", "scale", "gamma")),
    ".diff_b": ("diff_b", ("bias",)),
    ".diff_m": ("diff_m", ("modulation", "scale_shift_table")),
}
"""How keys of whole differences end -> their role, and the leaves of the tensors that they are added to."""

AlphaKeys = Literal["never", "kept", "always"]
"""Whether a dialect is written with alphas: not, where one is stored, or for each LoRA, since its readers expect it."""


@dataclass(frozen=True)
class Dialect:
    """How a LoRA is written for one program: `prefix + module + down`, dots of the module kept or made underscores.

    `prefixes`: the first is written; a file of one of the others is told to be of this dialect too.
    """

    prefixes: tuple[str, ...]
    down: str
    up: str
    alpha: AlphaKeys = "never"
    underscored: bool = False


DIALECTS: Mapping[str, Dialect] = {
    "diffsynth": Dialect(("", "pipe.{component}."), ".lora_A.default.weight", ".lora_B.default.weight"),
    "diffusers": Dialect(("transformer.", ""), ".lora_A.weight", ".lora_B.weight"),
    "comfyui": Dialect(("diffusion_model.",), ".lora_A.weight", ".lora_B.weight", alpha="kept"),
    "kohya": Dialect(("lora_unet_",), ".lora_down.weight", ".lora_up.weight", alpha="always", underscored=True),
}


@dataclass(frozen=True)
class Vocabulary:
    """One set of names for the modules of a component.

    `title`: the dialects that write these names. `names` leads from documented names to these, which may be of several
    parts of a documented module; `fused`: from these names to documented ones, of which a module here may be several.
    """

    title: str
    names: KeyMap = SAME_NAMES
    fused: bool = False

    def parts(self, name: str) -> tuple[str, ...]:
        """What a documented module or tensor is called here: one name, or those of its parts; none if it has none."""
        if not self.fused:
            return self.names.to_targets(name) or ()
        whole = self.names.to_source(name)
        return () if whole is None else (whole,)

    def documented(self, name: str) -> tuple[str, ...]:
        """The documented modules or tensors that a name here is of."""
        if self.fused:
            return self.names.to_targets(name) or ()
        whole = self.names.to_source(name)
        return () if whole is None else (whole,)

    def shape(self, name: str, shapes: Mapping[str, Shape]) -> Shape:
        """The shape of a tensor, by its name here, given those of documented tensors; empty where they do not tell."""
        wholes = self.documented(name)
        if not wholes or any(not shapes.get(whole) for whole in wholes):
            return ()
        if self.fused:
            return self.names.fuse_shape(name, shapes)
        return self.names.split_shape(wholes[0], shapes[wholes[0]]).get(name, ())


@dataclass(frozen=True)
class LoraNaming:
    """How LoRA files call the modules of one component.

    `dialects`: for dialects that name modules otherwise: documented names -> those there, which may be of several
    modules; None: the dialect has no names for this component.
    `fused`: for dialects of whose modules one may be several documented ones: names there -> documented names.
    `modules`: documented names of all modules that can carry a LoRA, with `{}` for numbers.
    `sides`: rows and columns of the weight of some of `modules`, in the same unit: what tells families apart whose
    modules have the same names.
    `blocks`: how a documented name begins -> how many blocks published models have at most.
    """

    component: str = "dit"
    dialects: Mapping[str, KeyMap | None] = field(default_factory=dict)
    fused: Mapping[str, KeyMap] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    sides: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)

    def known(self, dialect_name: str) -> bool:
        """Whether a dialect has names for the modules of this component."""
        return self.dialects.get(dialect_name, SAME_NAMES) is not None

    def written(self, dialect_name: str) -> bool:
        """Whether the LoRA of each documented module has names of its own in a dialect."""
        return self.known(dialect_name) and dialect_name not in self.fused

    def vocabulary(self, dialect_name: str) -> Vocabulary:
        """The names of a dialect.

        Raises:
            KeyError: when it has none.
        """
        fused = self.fused.get(dialect_name)
        names = self.dialects.get(dialect_name, SAME_NAMES) if fused is None else fused
        if names is None:
            raise KeyError(dialect_name)
        return Vocabulary(dialect_name, names, fused is not None)

    @property
    def vocabularies(self) -> tuple[Vocabulary, ...]:
        """All that files may have, each once; the documented names first."""
        found: dict[tuple[KeyMap, bool], Vocabulary] = {}
        for vocabulary in map(self.vocabulary, filter(self.known, DIALECTS)):
            known = found.get((vocabulary.names, vocabulary.fused))
            title = f"{known.title}/{vocabulary.title}" if known else vocabulary.title
            found[vocabulary.names, vocabulary.fused] = replace(vocabulary, title=title)
        return tuple(found.values())

    def modules_met(self, keys: Iterable[str]) -> list[str]:
        """Documented names of all modules that can carry a LoRA, with the numbers that stand in `keys`."""
        numbers = sorted({number for key in keys for number in _NUMBER.findall(key)}, key=int)
        return [
            pattern.format(*chosen)
            for pattern in self.modules
            for chosen in product(numbers, repeat=pattern.count("{}"))
        ]


_NUMBER = re.compile(r"\d+")


def spell(module: str, dialect_name: str) -> str:
    """A module's name in a dialect as its keys have it."""
    return underscored(module) if DIALECTS[dialect_name].underscored else module


def underscored(module: str) -> str:
    """A module's name with underscores in the place of dots."""
    return module.replace(".", "_")


DIT = LoraNaming()


# Other adapters

OTHER_ADAPTERS = {
    r"lokr_.*": "LoKr",
    r"hada_.*": "LoHa",
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"lora_mid": "LoRA with a core tensor (Tucker decomposition)",
    r"oft_.*": "OFT",
    r"boft_.*": "BOFT",
    r"ia3_.*|on_input": "IA3",
    r"vera_lambda_.*": "VeRA",
    r"glora_.*|[ab][12]": "GLoRA",
    r"bias_diff|bitfit.*": "BitFit",
    r"w_norm|b_norm": "LyCORIS norm",
    r"set_weight|reshape_weight": "ComfyUI weight replacement",
    r"lora_embedding_[AB]": "embedding LoRA",
    r"lora_bias|lora_[AB]_bias": "LoRA with biases",
}
"""What a part of a key is in files of other adapters -> their name."""
_OTHER_ENDINGS = {r".*\.lora_(B|up)(\.default)?\.bias": "LoRA with biases"}
_OTHER = [(re.compile(rf"(.*\.)?({part})(\..*)?"), title) for part, title in OTHER_ADAPTERS.items()] + [
    (re.compile(ending), title) for ending, title in _OTHER_ENDINGS.items()
]


def refuse_other_adapters(path: object, keys: Iterable[str]) -> None:
    """Raises: DiffSynthError: when keys are those of another kind of adapter, whose tensors mean something else."""
    present = list(keys)
    for pattern, title in _OTHER:
        found = sorted(key for key in present if not is_lora_key(key) and pattern.fullmatch(key))
        if found:
            raise DiffSynthError(
                f"`{path}`: {title} adapters are not supported yet: {list_names(found)}",
                "extract a plain LoRA with the program that wrote it",
            )


# Keys


def is_lora_key(key: str) -> bool:
    """Whether a key ends as those of LoRAs do."""
    return key.endswith(tuple(ENDINGS))


def is_difference_key(key: str) -> bool:
    """Whether a key ends as those of whole differences do."""
    return key.endswith(tuple(DIFFERENCES))


def split_lora_key(key: str) -> tuple[str, Role] | None:
    """A key of a LoRA without its ending, and what it is of it."""
    ending = max((text for text in ENDINGS if key.endswith(text)), key=len, default=None)
    return (key.removesuffix(ending), ENDINGS[ending]) if ending else None


def module_of_lora_key(key: str) -> str:
    """A key of a LoRA file without its ending."""
    found = split_lora_key(key)
    return found[0] if found else key


@dataclass(frozen=True)
class LoraKeys:
    """Where a file keeps the halves of one LoRA; a missing half is None."""

    down: str | None = None
    up: str | None = None
    alpha: str | None = None


def stem_keys(module: str, dialect_name: str) -> LoraKeys:
    """The keys that a dialect has for the LoRA of a module, given by its name there; that of an alpha even where it is
    not always written."""
    dialect = DIALECTS[dialect_name]
    stem = dialect.prefixes[0] + spell(module, dialect_name)
    return LoraKeys(stem + dialect.down, stem + dialect.up, None if dialect.alpha == "never" else stem + ALPHA)


def lora_keys(module: str, dialect_name: str, naming: LoraNaming = DIT) -> tuple[LoraKeys, ...]:
    """The keys under which a dialect writes the LoRA of `module` (its documented name), for each of its parts there.

    `alpha` is given where the dialect's readers expect one; the others take alpha = rank where none is stored.
    """
    found = tuple(stem_keys(part, dialect_name) for part in naming.vocabulary(dialect_name).parts(module))
    return found if DIALECTS[dialect_name].alpha == "always" else tuple(replace(keys, alpha=None) for keys in found)


class _Place(NamedTuple):
    """What a key is of: a module or tensor by its name in a vocabulary, and its role."""

    name: str
    role: Role


@dataclass(frozen=True)
class LoraMatch:
    """The keys of a file, understood in one vocabulary.

    `loras`: module, by its name in the vocabulary -> its keys. `differences`: tensor, by its name there -> its key.
    `prefixes`: those met. `unmatched`: keys that are of no module. `repeated`: those of them whose place another key
    of the file has already.
    """

    vocabulary: Vocabulary
    loras: Mapping[str, LoraKeys] = field(default_factory=dict)
    differences: Mapping[str, str] = field(default_factory=dict)
    prefixes: frozenset[str] = frozenset()
    unmatched: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()

    def dialect(self, naming: LoraNaming) -> str | None:
        """The dialect whose prefix, names and endings the file has; None: it mixes them as none does."""
        downs = {keys.down for keys in self.loras.values() if keys.down}
        return next((name for name in DIALECTS if self._speaks(name, naming, downs)), None)

    def _speaks(self, dialect_name: str, naming: LoraNaming, downs: Collection[str]) -> bool:
        dialect = DIALECTS[dialect_name]
        if not naming.known(dialect_name) or dialect_name not in self.vocabulary.title.split("/"):
            return False
        own = {prefix.format(component=naming.component) for prefix in dialect.prefixes}
        endings = (dialect.down, ".lora_down.weight") if dialect.alpha == "kept" else (dialect.down,)
        return self.prefixes <= own and all(key.endswith(endings) for key in downs)


def find_lora_keys(
    keys: Iterable[str], modules: Collection[str], naming: LoraNaming = DIT, tensors: Collection[str] = ()
) -> LoraMatch:
    """The keys of a LoRA file by the modules that they are of, in the vocabulary that explains most of them.

    Args:
        modules: documented names of the modules that there are. Underscores in keys are resolved against them.
        tensors: documented names of the tensors that there are, of which a file may hold whole differences.
    """
    present = list(keys)
    found = [_match(present, modules, vocabulary, naming, tensors) for vocabulary in naming.vocabularies]
    return min(found, key=lambda match: len(match.unmatched))


def fits_vocabulary(
    keys: Collection[str], modules: Collection[str], vocabulary: Vocabulary, naming: LoraNaming
) -> bool:
    """Whether each key is of a module, by its name in one vocabulary."""
    return not _match(keys, modules, vocabulary, naming, ()).unmatched


def _match(
    keys: Collection[str],
    modules: Collection[str],
    vocabulary: Vocabulary,
    naming: LoraNaming,
    tensors: Collection[str],
) -> LoraMatch:
    names = _spellings(part for module in modules for part in vocabulary.parts(module))
    changed = _tensor_spellings(part for tensor in tensors for part in vocabulary.parts(tensor))
    prefixes = sorted((text.format(component=naming.component) for text in PREFIXES), key=len, reverse=True)
    taken: dict[_Place, str] = {}
    met, unmatched, repeated = set(), [], []
    for key in keys:
        found = _find_place(key, prefixes, names, changed)
        if found is None or found[0] in taken:
            unmatched.append(key)
            repeated += [key] if found else []
        else:
            taken[found[0]] = key
            met.add(found[1])
    loras: dict[str, dict[str, str]] = {}
    for (name, role), key in taken.items():
        if role in ("down", "up", "alpha"):
            loras.setdefault(name, {})[role] = key
    differences = {name: key for (name, role), key in taken.items() if role not in ("down", "up", "alpha")}
    halves = {name: LoraKeys(**parts) for name, parts in loras.items()}
    return LoraMatch(vocabulary, halves, differences, frozenset(met), tuple(unmatched), tuple(repeated))


def _find_place(
    key: str, prefixes: Iterable[str], names: Mapping[str, str], changed: Mapping[tuple[str, Role], str]
) -> tuple[_Place, str] | None:
    """What a key is of, and its prefix; None: of nothing that is known."""
    half = split_lora_key(key)
    difference = next((text for text in DIFFERENCES if key.endswith(text)), None)
    if not half and not difference:
        return None
    stem, role = half or (key.removesuffix(difference or ""), DIFFERENCES[difference or ""][0])
    for prefix in prefixes:
        if stem.startswith(prefix):
            rest = stem.removeprefix(prefix)
            name = names.get(rest) if half else changed.get((rest, role))
            if name is not None:
                return _Place(name, role), prefix
    return None


def _spellings(names: Iterable[str]) -> dict[str, str]:
    """Names as keys may spell them, dotted or with underscores -> names; a spelling of two names is left out."""
    found: dict[str, str] = {}
    doubtful = set()
    for name in names:
        for text in {name, underscored(name)}:
            if found.setdefault(text, name) != name:
                doubtful.add(text)
    return {text: name for text, name in found.items() if text not in doubtful or text == name}


def _tensor_spellings(tensors: Iterable[str]) -> dict[tuple[str, Role], str]:
    """(spelling of what the tensor is of, role of its difference) -> tensor."""
    leaves = {leaf: role for role, own in DIFFERENCES.values() for leaf in own}
    found: dict[str, list[str]] = {}
    for tensor in tensors:
        found.setdefault(tensor.rpartition(".")[2], []).append(tensor)
    return {
        (text, leaves[leaf]): f"{stem}.{leaf}" if stem else leaf
        for leaf, own in found.items()
        if leaf in leaves
        for text, stem in _spellings(tensor.removesuffix(leaf).removesuffix(".") for tensor in own).items()
    }
