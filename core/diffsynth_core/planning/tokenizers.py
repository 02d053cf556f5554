"""Where the tokenizers of a run lie. No torch."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem
from diffsynth_core.families.interface import ComponentFiles, FamilyFacts, TokenizerFacts
from diffsynth_core.sources.model_files import locate_folder


def find_tokenizers(
    parameters: Parameters,
    facts: FamilyFacts,
    components: Mapping[str, ComponentFiles],
    base: Path,
    problems: list[Problem],
) -> dict[str, Path]:
    """The tokenizer folder of each tokenizer parameter: the given one, else the one beside the component's files,
    else the family's own below `base`. Adds to `problems` what is missing or damaged."""
    found = {}
    for parameter, tokenizer in facts.tokenizers.items():
        if tokenizer.inputs and not set(tokenizer.inputs) & set(parameters.extra_inputs):
            continue
        given: str | None = getattr(parameters, parameter)
        files = components.get(tokenizer.component)
        if given is None and files is None:
            continue
        places = [given] if given else [*_beside(files, tokenizer), tokenizer.default] if files else []
        folder = next((folder for place in places if (folder := locate_folder(place, base))), None)
        if folder:
            found[parameter] = folder
            problems += _folder_problems(folder, tokenizer, parameter)
        else:
            shown = dict.fromkeys(place if given else str(_absolute(place, base)) for place in places)
            there = " nor at ".join(f"`{place}`" for place in shown)
            problems.append(
                Problem(f"there is no {tokenizer.what} at {there}", f"name its folder with `--{parameter}`")
            )
    return found


def _beside(files: ComponentFiles, tokenizer: TokenizerFacts) -> list[str]:
    return [os.path.normpath(place / folder) for place in files.folders for folder in tokenizer.folders]


def _absolute(place: str, base: Path) -> Path:
    model_id, colon, folder = place.partition(":")
    return base / model_id / folder if colon else Path(place)


def _folder_problems(folder: Path, tokenizer: TokenizerFacts, parameter: str) -> list[Problem]:
    """What makes a tokenizer folder unreadable, without loading it."""
    hint = f"fetch the folder again, or name another with `--{parameter}`"
    layout = next((layout for layout in tokenizer.layouts if all((folder / name).is_file() for name in layout)), None)
    if layout is None:
        wanted = " or ".join(" and ".join(f"`{name}`" for name in layout) for layout in tokenizer.layouts)
        return [Problem(f"cannot read the {tokenizer.what} in `{folder}`: it lacks {wanted}", hint)]
    for name in layout:
        try:
            text = (folder / name).read_text(encoding="utf-8")
            if name.endswith(".json"):
                json.loads(text)
        except ValueError as error:
            return [Problem(f"cannot read the {tokenizer.what} in `{folder}`: `{name}` is damaged: {error}", hint)]
    return []
