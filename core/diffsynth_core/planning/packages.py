"""Packages that are not installed with diffsynth."""

import importlib.util
from dataclasses import dataclass

from diffsynth_core.errors import Problem


@dataclass(frozen=True)
class Package:
    """A package that is not installed with diffsynth.

    Attributes:
        name: of the distribution.
        module: what is imported.
        extra: of our distribution, which installs it.
    """

    name: str
    module: str
    extra: str


def missing_package(what: str, package: Package) -> list[Problem]:
    """Return the problem that the package is not installed which `what` needs."""
    if importlib.util.find_spec(package.module) is not None:
        return []
    message = f"{what} needs the package {package.name}, which is not installed"
    return [Problem(message, f"`pip install 'diffsynth-cli[{package.extra}]'`")]
