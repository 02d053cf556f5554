"""Which of a sample's captions, if any, a draw of it is trained with. No torch."""

from diffsynth_core.randomness import key_of


def draw_choice(captions: int, dropout: float, seed: int, epoch: int, sample: int, repeat: int) -> int:
    """Draw the index of one of `captions` captions, uniformly, for one draw of a sample.

    With probability `dropout` (0 <= dropout < 1) it is instead `captions`, the index of the empty caption
    (`Sample.choices`). The two draws have keys of their own: dropout changes no choice among the captions.
    """
    if dropout and key_of("caption_dropout", seed, epoch, sample, repeat) < dropout * 2**64:
        return captions
    return key_of("caption", seed, epoch, sample, repeat) * captions // 2**64 if captions > 1 else 0
