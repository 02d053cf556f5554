"""The caption of a draw: one of several, or none with the probability of `--caption_dropout`."""

from collections import Counter

import pytest

from diffsynth_core.config.choices import TRAINING_TIMESTEPS
from diffsynth_core.data.captions import draw_choice
from diffsynth_core.training.timesteps import draw_uniform

DRAWS = [(7, epoch, sample, repeat) for epoch in range(10) for sample in range(100) for repeat in range(10)]


@pytest.mark.parametrize("captions", [1, 3])
def test_the_empty_caption_is_drawn_as_often_as_asked_for(captions):
    counts = Counter(draw_choice(captions, 0.1, *draw) for draw in DRAWS)
    assert counts[captions] / len(DRAWS) == pytest.approx(0.1, abs=0.01)
    for choice in range(captions):
        assert counts[choice] / len(DRAWS) == pytest.approx(0.9 / captions, abs=0.02)


def test_dropout_changes_no_choice_among_the_captions():
    choices = [draw_choice(3, 0, *draw) for draw in DRAWS]
    dropped = [draw_choice(3, 0.5, *draw) for draw in DRAWS]
    assert set(choices) == {0, 1, 2}
    assert all(after in (before, 3) for before, after in zip(choices, dropped, strict=True))
    assert choices == [draw_choice(3, 0.0, *draw) for draw in DRAWS]


def test_a_higher_dropout_drops_what_a_lower_one_does():
    low, high = ({draw for draw in DRAWS if draw_choice(1, dropout, *draw)} for dropout in (0.1, 0.3))
    assert low < high


@pytest.mark.parametrize("part", range(4), ids=["seed", "epoch", "sample", "repeat"])
def test_every_part_of_the_key_counts(part):
    changed = [(*draw[:part], draw[part] + 1000, *draw[part + 1 :]) for draw in DRAWS]
    drops, others = ([draw_choice(1, 0.5, *draw) for draw in draws] for draws in (DRAWS, changed))
    same = sum(one == other for one, other in zip(drops, others, strict=True))
    assert same / len(DRAWS) == pytest.approx(0.5, abs=0.02)


def test_it_is_independent_of_the_timestep_and_of_the_caption():
    """Each tenth of the timesteps, and each caption that would be drawn, is dropped as often as any other."""
    tenths, captions = Counter(), Counter()
    for draw in DRAWS:
        if draw_choice(3, 0.5, *draw) == 3:
            tenths[draw_uniform(draw, range(TRAINING_TIMESTEPS)) * 10 // TRAINING_TIMESTEPS] += 1
            captions[draw_choice(3, 0, *draw)] += 1
    assert len(tenths) == 10 and all(count == pytest.approx(500, abs=70) for count in tenths.values())
    assert len(captions) == 3 and all(count == pytest.approx(1667, abs=120) for count in captions.values())
