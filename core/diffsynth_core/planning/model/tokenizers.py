"""The tokenizer folders of a run. No torch."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem, report
from diffsynth_core.hub.model_files import MissingFiles, download_command, locate_folder, split_entry
from diffsynth_core.hub.model_folder import model_folder
from diffsynth_core.json_files import MAX_TOKENIZER_BYTES, UnreadableFile, read_json, read_text
from diffsynth_core.models.spec import ComponentFiles, FamilyFacts, Shapes, TokenizerFacts

CONFIG_FILES = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
"""Optional files that transformers reads with the vocabulary."""


def find_tokenizers(
    parameters: Parameters,
    facts: FamilyFacts,
    components: Mapping[str, ComponentFiles],
    shapes: Mapping[str, Shapes],
    base: Path,
) -> dict[str, Path]:
    """Return the folder of each tokenizer: the one set, or one next to the component's files, or the family's own in
    `base`.

    Reports missing and damaged ones.
    """
    found = {}
    for parameter, tokenizer in facts.tokenizers.items():
        if tokenizer.inputs and not set(tokenizer.inputs) & set(parameters.extra_inputs):
            continue
        given: str | None = getattr(parameters, parameter)
        files = components.get(tokenizer.component)
        if given is None and files is None:
            continue
        candidates = [given] if given else [*_adjacent_folders(files, tokenizer), tokenizer.default] if files else []
        folder = next((folder for candidate in candidates if (folder := locate_folder(candidate, base))), None)
        if folder:
            found[parameter] = folder
            rows = shapes.get(tokenizer.component, {}).get(tokenizer.embedding, (None,))[0]
            report(*_folder_problems(folder, tokenizer, parameter, rows))
        else:
            shown = dict.fromkeys(name if given else str(_absolute(name, base)) for name in candidates)
            searched = " or at ".join(f"`{path}`" for path in shown)
            report(_missing_tokenizer(f"no {tokenizer.what} found at {searched}", parameter, candidates[-1]))
    return found


def _missing_tokenizer(message: str, parameter: str, name: str) -> Problem:
    """Return the problem of a missing tokenizer; one in a repository can be downloaded."""
    hint = f"set its folder with `--{parameter}`"
    if split_entry(name) is None:
        return Problem(message, hint)
    entry = name.rstrip("/") + "/*"
    command = download_command(entry)
    return MissingFiles(message, f"download it with `{command}`, or {hint}", entry=entry, command=command)


def _adjacent_folders(files: ComponentFiles, tokenizer: TokenizerFacts) -> list[str]:
    return [os.path.normpath(parent / folder) for parent in files.folders for folder in tokenizer.folders]


def _absolute(name: str, base: Path) -> Path:
    model_id, colon, folder = name.partition(":")
    return model_folder(model_id, base) / folder if colon else Path(name)


def _folder_problems(folder: Path, tokenizer: TokenizerFacts, parameter: str, rows: int | None) -> list[Problem]:
    """Return why a tokenizer folder is unreadable or belongs to another model, without loading the tokenizer.

    Args:
        rows: number of rows of the text encoder's embedding; None if unknown.
    """
    hint = f"download the folder again, or set another with `--{parameter}`"
    layout = next((layout for layout in tokenizer.layouts if all((folder / name).is_file() for name in layout)), None)
    if layout is None:
        wanted = " or ".join(" and ".join(f"`{name}`" for name in layout) for layout in tokenizer.layouts)
        return [Problem(f"cannot read the {tokenizer.what} in `{folder}`: missing {wanted}", hint)]
    try:
        contents = {name: _read(folder / name) for name in (*layout, *CONFIG_FILES) if (folder / name).exists()}
    except UnreadableFile as error:
        return [Problem(f"cannot read the {tokenizer.what}: {error}", hint)]
    for name in layout:
        content = contents.get(name)
        fault = _mismatch(name, content, tokenizer, rows)
        if fault:
            return [
                Problem(
                    f"`{folder / name}` is not the {tokenizer.what} of the {tokenizer.component}: {fault}",
                    f"set its folder with `--{parameter}`",
                )
            ]
    return []


def _read(path: Path) -> dict[str, Any] | None:
    """Read a tokenizer file as strictly as transformers does; None for a text file.

    Raises:
        UnreadableFile: if it is damaged.
    """
    if path.suffix != ".json":
        read_text(path, MAX_TOKENIZER_BYTES, "")
        return None
    return read_json(path, dict[str, Any], "", MAX_TOKENIZER_BYTES, byte_order_mark=False)


def _mismatch(name: str, content: dict[str, Any] | None, tokenizer: TokenizerFacts, rows: int | None) -> str | None:
    """Return why a tokenizer file belongs to another model: its type, or more tokens than the embedding has rows."""
    if content is None or name not in ("tokenizer.json", "vocab.json"):
        return None
    model = content.get("model") if name == "tokenizer.json" else {"vocab": content}
    if not isinstance(model, dict):
        return None
    kind, tokens = model.get("type"), model.get("vocab")
    if tokenizer.model and kind and kind != tokenizer.model:
        return f"its type is {kind}, not {tokenizer.model}"
    if rows is not None and isinstance(tokens, dict | list) and len(tokens) > rows:
        return f"it has {len(tokens)} tokens, but the text encoder has {rows}"
    return None
