"""What names and shapes of tensors tell of an architecture. No torch."""

from diffsynth_core.families.interface import Shapes


def count_blocks(shapes: Shapes, prefix: str) -> int:
    """How many numbered blocks stand below `prefix`."""
    return 1 + max(int(name.removeprefix(prefix).partition(".")[0]) for name in shapes if name.startswith(prefix))
