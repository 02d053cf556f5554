"""Keys of checkpoints: `pipe.<component>.<parameter>`, from some of which a prefix was taken off. No torch."""

import re

_KEY = re.compile(r"pipe\.(?P<component>\w{1,64})\.(?P<name>.+)", re.DOTALL | re.ASCII)


def strip_controlnet_index(text: str) -> str:
    """A key or a prefix of keys without the number of the ControlNet.

    The reference trainer counts ControlNets, of which a run here has one.
    """
    return text.replace("pipe.controlnet.models.0.", "pipe.controlnet.", 1)


def split_key(key: str) -> tuple[str, str] | None:
    """(component, name in it) of a whole key; None for one without the beginning of keys."""
    match = _KEY.fullmatch(strip_controlnet_index(key))
    return (match["component"], match["name"]) if match else None
