"""Which of a sample's captions a draw of it is trained with. No torch."""

from diffsynth_core.randomness import key_of


def draw_choice(captions: int, seed: int, epoch: int, sample: int, repeat: int) -> int:
    """Draw the index of one of `captions` captions, uniformly, for one draw of a sample."""
    return key_of("caption", seed, epoch, sample, repeat) * captions // 2**64 if captions > 1 else 0
