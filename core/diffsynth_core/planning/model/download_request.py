"""The request of a download command: files of recipes and models, or a dataset. No torch."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.config.recipes import recipe_names
from diffsynth_core.errors import FaultsFound, Problem, raise_if_any, suggest
from diffsynth_core.files import model_base_path
from diffsynth_core.hub.client import Repository
from diffsynth_core.hub.file_requests import FileRequest, RepoFiles, absent
from diffsynth_core.hub.model_files import split_entry
from diffsynth_core.models.recognition import family_of_model
from diffsynth_core.planning.model.required_files import files_of_entry, files_of_recipe

DATA_FOLDER = Path("data")
"""Parent folder of downloaded datasets."""
EVERYTHING = "*"
"""Glob of all files."""
_ID = re.compile(r"(?!\.+(/|$))[\w.-]+(/(?!\.+$)[\w.-]+)?")
"""`owner/name`; some old models have no owner. Not only dots, which would be folders."""


@dataclass(frozen=True)
class DownloadRequest:
    """The requested files, the folder to download into, and the command that requests them."""

    files: tuple[FileRequest, ...]
    base: Path
    command: str

    def missing(self) -> list[FileRequest]:
        """Return the files that are not on disk, judged by their names."""
        return absent(self.files, self.base)


def request_download(
    names: Sequence[str],
    dataset: str | None,
    include: Sequence[str],
    local_dir: Path | None,
    local_model_path: Path | None,
) -> DownloadRequest:
    """Return the request of the command's arguments.

    Args:
        names: recipes, and entries `model_id:glob`.
        include: globs of dataset paths, in which `*` matches `/` too.

    Raises:
        FaultsFound: unknown names, and options that exclude each other.
    """
    problems = _misuses(names, dataset, include, local_dir, local_model_path)
    problems += _id_problems(dataset, "dataset") if dataset else []
    if dataset and not problems:
        repo_files = RepoFiles(Repository("dataset", dataset), tuple(include) or (EVERYTHING,), anywhere=True)
        folder = local_dir or DATA_FOLDER / dataset.rpartition("/")[2]
        words = ["--dataset", dataset, *(word for glob in include for word in ("--include", glob))]
        words += ["--local_dir", str(local_dir)] if local_dir else []
        return DownloadRequest((FileRequest((repo_files,)),), folder, _command(words))
    files: list[FileRequest] = []
    for name in names:
        try:
            files += _requests_of(name)
        except FaultsFound as error:
            problems += error.problems
    raise_if_any(problems)
    words = [*names, *(["--local_model_path", str(local_model_path)] if local_model_path else [])]
    return DownloadRequest(tuple(dict.fromkeys(files)), local_model_path or model_base_path(), _command(words))


def offline_problems(request: DownloadRequest) -> list[Problem]:
    """Return the problems of missing files for a machine without access to hubs."""
    hint = f"download it with `{request.command}` where a hub can be accessed"
    return [Problem(f"no complete file matches `{item}` below `{request.base}`", hint) for item in request.missing()]


def _requests_of(name: str) -> list[FileRequest]:
    """Return the files of a recipe or an entry."""
    if name in recipe_names():
        return files_of_recipe(name)
    parts = split_entry(name)
    if parts:
        raise_if_any(_id_problems(parts[0], "model"))
        return files_of_entry(name, family_of_model(parts[0]))
    near = suggest(name, recipe_names())
    if near:
        hint = f"did you mean `{near}`?"
    elif "/" in name:
        hint = f"pass `{name.rstrip(':')}:GLOB`, or `--dataset {name.rstrip(':')}`"
    else:
        hint = "see `diffsynth recipe list`"
    raise FaultsFound([Problem(f"`{name}` is neither a recipe nor MODEL_ID:GLOB", hint, wrong_use=True)])


def _misuses(
    names: Sequence[str],
    dataset: str | None,
    include: Sequence[str],
    local_dir: Path | None,
    local_model_path: Path | None,
) -> list[Problem]:
    """Return the problems of arguments that exclude each other."""
    problems = []
    if not names and not dataset:
        problems.append(("nothing to download", "pass a recipe, MODEL_ID:GLOB, or `--dataset ID`"))
    if names and dataset:
        problems.append(("models and a dataset cannot be downloaded together", "download them with two commands"))
    if not dataset:
        given = {"include": include, "local_dir": local_dir}
        problems += [
            (f"`--{option}` is for datasets", "use `--local_model_path` for models, MODEL_ID:GLOB to select files")
            for option, value in given.items()
            if value
        ]
    elif local_model_path:
        problems.append(("`--local_model_path` is for models", "use `--local_dir`"))
    return [Problem(message, hint, wrong_use=True) for message, hint in problems]


def _id_problems(name: str, kind: str) -> list[Problem]:
    """Return the problem of a name that no repository can have."""
    if _ID.fullmatch(name):
        return []
    return [Problem(f"`{name}` is not a valid name of a {kind} on a hub", "write it as `owner/name`", wrong_use=True)]


def _command(words: Sequence[str]) -> str:
    return f"diffsynth download {shlex.join(words)}"
