"""Keys of checkpoints: `pipe.<component>.<parameter>`, some of them with a prefix removed. No torch."""

import re

_KEY = re.compile(r"pipe\.(?P<component>\w{1,64})\.(?P<name>.+)", re.DOTALL | re.ASCII)


def strip_controlnet_index(text: str) -> str:
    """Remove the index of the ControlNet from a key or a prefix of keys.

    DiffSynth-Studio numbers ControlNets (`models.0.`); a run here has one.
    """
    return text.replace("pipe.controlnet.models.0.", "pipe.controlnet.", 1)


def split_key(key: str) -> tuple[str, str] | None:
    """Split a full key into component and parameter name; None if it does not start with `pipe.`."""
    match = _KEY.fullmatch(strip_controlnet_index(key))
    return (match["component"], match["name"]) if match else None
