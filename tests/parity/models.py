"""Tiny models of any family, found and loaded as in a run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import collect_problems
from diffsynth_core.models.family import Encoded, Family
from diffsynth_core.models.loading import load_component
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.spec import ComponentFiles, Variant
from diffsynth_core.planning.model.components import find_components
from diffsynth_core.progress import SilentReporter
from tests.parity.photographs import photograph, pixels_of

SIZE = (64, 96)
"""Height and width of the target."""
PUBLISHED_PIXELS = 1024 * 1024
FEW_PIXELS = PUBLISHED_PIXELS // 64
"""`max_pixels` at which reference images have a 64th of the published area."""


@dataclass(frozen=True)
class Ours:
    """A model as in training, float32."""

    family: Family
    variant: Variant
    components: Mapping[str, Any]

    @property
    def transformer(self) -> Any:
        return self.components["dit"]

    def sample(
        self, prompt: str, name: str = "astronaut", shown: Sequence[Image.Image] = (), max_pixels: int = FEW_PIXELS
    ) -> dict[str, Any]:
        """Return the loaded row of a dataset of images whose target is the photograph of a name."""
        references = {
            reference.name: [pixels_of(_stretched(image, reference, max_pixels)) for image in shown]
            for reference in self.variant.conditions
        }
        return {"prompt": prompt, "image": pixels_of(photograph(name).resize(SIZE[::-1])), **references}

    @torch.no_grad()
    def encode(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the encodings of a sample by all encoders whose columns it has."""
        encoded: dict[str, Tensor] = {}
        for encoder in self.variant.encoders:
            if sample.keys() >= set(encoder.columns):
                read = {name: sample[name] for name in encoder.columns}
                if encoder.first_frame_only:
                    read["video"] = read["video"][:, :1]
                encoded |= self.family.encode(encoder, self.components, read)
        return encoded

    def predict(self, noisy: Tensor, sigma: Tensor, batch: Encoded) -> Tensor:
        return self.family.predict_velocity(self.components, noisy, sigma, batch)


def _stretched(image: Image.Image, reference: Any, max_pixels: int) -> Image.Image:
    assert reference.factor == 1
    height, width = reference.size(image.width, image.height, max_pixels)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def find_files(family: str, base: Path, component: str, entry: str) -> ComponentFiles:
    """Return the files of one component as a run finds them."""
    with collect_problems() as problems:
        found = find_components(Parameters(model_id_with_origin_paths=(entry,)), family, base)
    assert found and component in found.components, problems
    return found.components[component]


def load_files(family: str, files: ComponentFiles, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a component with our loader."""
    return load_component(load_family(family), files, dtype, torch.device("cpu"), SilentReporter())


def load_ours(base: Path, entries: Iterable[str], **more: Any) -> Ours:
    """Load all components as a run with these files and `more` parameters does."""
    parameters = Parameters(model_id_with_origin_paths=tuple(entries), **more)
    with collect_problems() as problems:
        found = find_components(parameters, None, base)
    assert found and not problems, problems
    family = load_family(found.facts.name)
    components = {name: load_files(family.facts.name, files) for name, files in found.components.items()}
    tokenizers = {name: family.load_tokenizer(name, folder) for name, folder in found.tokenizers.items()}
    return Ours(family, found.variant, {**components, **tokenizers})
