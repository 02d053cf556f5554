"""The script that reads scenes from images reads what was drawn, so that what it reads of a model's images counts."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.shapes.reading import read
from tests.shapes.rendering import render
from tests.shapes.scenes import Scene, all_scenes, draw_scenes, split_scenes

NUMBER = 200
LEAST = 0.995


def share_read(scenes: list[Scene], change=lambda image: image) -> float:
    right = [read(change(render(scene, seed))) == scene for seed, scene in enumerate(scenes)]
    return sum(right) / len(right)


def with_noise(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 16, (*image.size, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def test_every_scene_has_its_caption():
    assert [len(all_scenes(number)) for number in (1, 2)] == [280, 16800]
    captions = {scene.caption for number in (1, 2) for scene in all_scenes(number)}
    assert len(captions) == 280 + 16800
    assert {"a red circle on yellow", "a red circle left of a blue square on yellow", "a white cross above a black diamond on cyan"} < captions  # fmt: skip


def test_held_out_scenes_are_never_drawn_for_training():
    for number, size in ((1, 42), (2, 2520)):
        trained, held_out = split_scenes(number)
        assert len(held_out) == size and not set(trained) & set(held_out)
        words = {word for scene in trained for word in scene.caption.split()}
        assert words == {word for scene in held_out for word in scene.caption.split()}, "every word is trained"
    drawn, held_out = set(draw_scenes(8000, seed=0)), set(draw_scenes(200, seed=0, held_out=True))
    assert not drawn & held_out and len(held_out) > 190
    assert 0.18 < sum(len(scene.figures) == 1 for scene in draw_scenes(8000, seed=0)) / 8000 < 0.22


@pytest.mark.parametrize("change", [lambda image: image, with_noise], ids=["rendered", "noise of 16"])
def test_scenes_are_read_from_their_images(change):
    scenes = draw_scenes(NUMBER, seed=1) + draw_scenes(NUMBER // 4, seed=1, held_out=True)
    share = share_read(scenes, change)
    print(f"{share:.2%} of {len(scenes)} read right")
    assert share >= LEAST


def test_an_image_of_something_else_is_no_scene():
    scene = draw_scenes(1, seed=2)[0]
    image = render(scene, 0)
    assert read(image) == scene
    assert read(Image.new("RGB", image.size, (220, 40, 40))) is None
    assert read(image.filter(ImageFilter.GaussianBlur(8))) != scene
    assert read(image.rotate(180)) != scene or len(scene.figures) == 1
