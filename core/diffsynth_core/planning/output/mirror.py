"""Whether a run can be copied to the mirror that its parameters name. No torch."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from diffsynth_core.checkpoints.run_folder import read_record
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.errors import DiffSynthError, Problem, suggest

LOCAL_SCHEMES = ("file", "local")
"""Schemes of URLs that name a folder of this machine."""


def mirror_problems(parameters: Parameters) -> Iterator[Problem]:
    """Yield what is wrong with the mirror and can be said without looking at it."""
    from fsspec import available_protocols, get_filesystem_class
    from fsspec.core import split_protocol

    mirror = parameters.mirror
    if mirror is None:
        return
    if not TASKS[parameters.task].trains:
        what = f"`mirror` copies runs that train, and `{parameters.task}` does not"
        yield Problem(what, "remove `--mirror`", wrong_use=True)
        return
    scheme, _ = split_protocol(mirror)
    if scheme is None or scheme in LOCAL_SCHEMES:
        yield from _local_problems(parameters, mirror)
        return
    try:
        password = urlsplit(mirror).password
    except ValueError:  # its message may hold the password
        yield Problem("`mirror` is no valid URL", "use a folder, or a URL such as `s3://bucket/run`", wrong_use=True)
        return
    if password:
        what = "`mirror` holds a password, which `run.json` would record"
        hint = "leave it out; the file systems of fsspec take it from their own logins, environment or configuration"
        yield Problem(what, hint, wrong_use=True)
    try:
        get_filesystem_class(scheme)
    except ValueError:
        near = suggest(scheme, available_protocols())
        hint = f"did you mean `{near}://`?" if near else "use a folder, or a URL such as `s3://bucket/run`"
        yield Problem(f"`mirror`: fsspec knows no file system `{scheme}://`", hint, wrong_use=True)
    except ImportError as error:
        missing = error.__cause__.name if isinstance(error.__cause__, ImportError) else None
        what = f"`mirror`: `{scheme}://` needs a package that is not installed: {error}"
        yield Problem(what, f"`pip install {missing}`" if missing else None)


def _local_problems(parameters: Parameters, mirror: str) -> Iterator[Problem]:
    """Yield the problem of a folder that lies in that of the run, or has it in it."""
    from fsspec.core import url_to_fs

    folder, run = Path(url_to_fs(mirror)[1]).resolve(), parameters.output_path.resolve()
    if folder == run or folder in run.parents or run in folder.parents:
        what = f"`mirror` `{mirror}` and `output_path` `{parameters.output_path}` lie in each other"
        yield Problem(what, "choose a folder beside it, on another disk or machine", wrong_use=True)


def unreachable_mirror(parameters: Parameters) -> list[Problem]:
    """Return why the run cannot be copied to its mirror, after writing a small file there and deleting it.

    Looks at nothing if `mirror_problems` has found something.
    """
    from diffsynth_core.checkpoints.mirror import Mirror, OfAnotherRun

    if parameters.mirror is None or any(mirror_problems(parameters)):
        return []
    try:
        record = read_record(parameters.output_path) if parameters.resume else None
    except DiffSynthError:
        return []  # planning reports it
    try:
        Mirror(parameters.mirror).check(record.id if record else None)
    except OfAnotherRun as error:
        return [Problem(problem.message, problem.hint, wrong_use=True) for problem in error.problems]
    except Exception as error:  # whatever the file system raises
        reason = " ".join(str(error).split()) or type(error).__name__
        what = f"the mirror `{parameters.mirror}` cannot be written: {reason}"
        return [Problem(what, "check its address and your login there, or remove `--mirror`")]
    return []
