"""Draw captions with diffusers' own pipeline, many at once, and count the images that show what the caption says."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import QwenImagePipeline
from PIL import Image
from safetensors.torch import load_file

from diffsynth_core.hub.model_folder import shipped_folder
from tests.shapes.concept import split_keyholes
from tests.shapes.reading import read
from tests.shapes.scenes import Scene, draw_scenes
from tests.shapes.untrained import MODEL_ID

STEPS, GUIDANCE = 12, 2.5
"""Sampling steps and scale of classifier-free guidance."""
BATCH = 50
"""Images that are drawn together."""


@dataclass(frozen=True)
class Drawn:
    """A caption, the scene that it describes, and what was drawn for it."""

    scene: Scene
    caption: str
    image: Image.Image

    @property
    def right(self) -> bool:
        """Whether the image shows the scene."""
        return read(self.image) == self.scene


def load_pipeline(folder: Path | None = None, checkpoint: Path | None = None, lora: Path | None = None):
    """Return the pipeline of the shipped model, or of that in `folder`, in float32.

    Args:
        checkpoint: weights of the transformer in place of its own.
        lora: loaded by the pipeline's own loader.
    """
    pipeline = QwenImagePipeline.from_pretrained(folder or shipped_folder(MODEL_ID), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if checkpoint:
        pipeline.transformer.load_state_dict(load_file(checkpoint))
    if lora:
        pipeline.load_lora_weights(lora)
    return pipeline


def draw(pipeline: QwenImagePipeline, asked: Sequence[tuple[Scene, str]], seed: int) -> list[Drawn]:
    """Draw captions, the one at place n with the seed `seed` + n."""
    drawn = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        images = pipeline(
            prompt=[caption for _, caption in part],
            negative_prompt=[""] * len(part),
            true_cfg_scale=GUIDANCE,
            num_inference_steps=STEPS,
            height=64,
            width=64,
            generator=[torch.Generator().manual_seed(seed + start + number) for number in range(len(part))],
        ).images
        drawn += [Drawn(scene, caption, image) for (scene, caption), image in zip(part, images, strict=True)]
    return drawn


def held_out(number: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """Return scenes that no model was trained on."""
    return [(scene, scene.caption) for scene in draw_scenes(number, seed, held_out=True)]


def keyholes(number: int) -> list[tuple[Scene, str]]:
    """Return keyholes in pairs of colors that were not taught; after 30, the first again."""
    untaught = split_keyholes()[1]
    return [(one.scene, one.caption) for one in (untaught[place % len(untaught)] for place in range(number))]


def share_right(drawn: Sequence[Drawn]) -> float:
    """Return the share of images that show their scene, 0 to 1."""
    return sum(one.right for one in drawn) / len(drawn)


def table(drawn: Sequence[Drawn]) -> Iterator[str]:
    """Yield lines with the share of right images for each ground, color, shape, and relation."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for one in drawn:
        scene, own = one.scene, {f"on {one.scene.ground}", one.scene.relation or "one figure"}
        own |= {word for figure in scene.figures for word in (figure.color, figure.shape)}
        total.update(own)
        right.update(own if one.right else ())
    for word in sorted(total):
        yield f"{word:12} {right[word]:4} of {total[word]:4}  {right[word] / total[word]:.1%}"
    yield f"{'all':12} {sum(one.right for one in drawn):4} of {len(drawn):4}  {share_right(drawn):.1%}"


def main() -> None:
    """Print the table of a model, for held-out scenes and three seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keyholes", action="store_true", help="ask for the new word instead")
    given = parser.parse_args()
    pipeline = load_pipeline(given.folder, given.checkpoint, given.lora)
    for seed in range(given.seeds):
        asked = keyholes(given.images) if given.keyholes else held_out(given.images, seed)
        print(f"seed {seed}", *table(draw(pipeline, asked, 1000 * seed)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
