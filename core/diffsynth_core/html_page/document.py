"""Parts of a self-contained HTML page, and its content security policy. No torch."""

import json
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffsynth_core.files import write_text

MARKED_BYTES = 2000
"""Bytes at the beginning of a page that contain its marker."""


def base_style() -> str:
    """Return the style of all pages: colors, light and dark, text, tables."""
    return (files("diffsynth_core.html_page") / "base.css").read_text(encoding="utf-8")


def read_part(package: str, name: str) -> str:
    """Return a template, style or script from the folder `page` of a package."""
    return (files(package) / "page" / name).read_text(encoding="utf-8")


def content_policy(style: str, script: str) -> str:
    """Return a content security policy that allows the page's own style and script, and embedded images, only."""
    allowed = {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": _hash_source(style),
        "script-src": _hash_source(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in allowed.items())


def _hash_source(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def json_for_script(value: Any) -> str:
    """Return ASCII JSON that neither ends a script element nor starts a comment, whatever its strings."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def generator_mark(command: str) -> str:
    """Return the marker in the head of the pages of a command."""
    return f'<meta name="generator" content="diffsynth {command}">'


def has_mark(path: Path, mark: str) -> bool:
    """Return whether a file is a page with a marker."""
    if not path.is_file() or path.is_symlink():
        return False
    with path.open("rb") as stream:
        return mark.encode() in stream.read(MARKED_BYTES)


def write_page_text(path: Path, page: str) -> None:
    """Write a page atomically; bytes of file names that are no text become character references.

    Raises:
        DiffSynthError: if the disk refuses.
    """
    write_text(path, page.encode("utf-8", "xmlcharrefreplace").decode())
