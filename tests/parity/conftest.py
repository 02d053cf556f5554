"""Tiny models loaded twice from the same files: by our loader, and by the pipelines of diffusers.

Fixtures without a family in their name are of Qwen-Image.
"""

import logging
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffsynth_core.models.loading import load_component
from diffsynth_core.models.recognition import recognize
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.spec import ComponentFiles
from diffsynth_core.progress import SilentReporter
from diffsynth_core.weights.headers import read_headers
from tests.conftest import MODEL_ID, PLACES
from tests.parity import flux2_models as flux2_repositories
from tests.parity import flux_models as flux_repository
from tests.parity import qwen_edit_models
from tests.parity.flux2_models import Flux2Pair
from tests.parity.flux_models import FluxPair
from tests.parity.qwen_edit_models import EditPair
from tests.parity.wan_models import KINDS, WanPair, load_pair, write_models

SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""The published scheduler configuration of Qwen-Image."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Use one thread: on a busy machine, threads wait for each other ten times as long as tiny models compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny weights and encodings of rehearsals are made, once for all tests; none of them trains there."""
    return tmp_path_factory.mktemp("rehearsals")


@pytest.fixture(scope="session")
def family():
    return load_family("qwen-image")


@pytest.fixture(scope="session")
def ours(family, tiny_models: Path) -> dict[str, Any]:
    """Our components, float32, loaded by our loader."""
    folder = tiny_models / MODEL_ID
    components: dict[str, Any] = {"tokenizer_path": family.load_tokenizer("tokenizer_path", folder / "tokenizer")}
    for component, place in PLACES.items():
        paths = tuple(sorted(folder.glob(place)))
        _, layout = recognize(read_headers(paths), family.facts)
        files = ComponentFiles(component, place, paths, paths[0].parent / "config.json", layout)
        components[component] = load_component(family, files, torch.float32, torch.device("cpu"), SilentReporter())
    return components


@pytest.fixture
def pipeline(tiny_models: Path) -> QwenImagePipeline:
    """diffusers' pipeline on the same files, float32, loaded by diffusers and transformers."""
    folder = tiny_models / MODEL_ID
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        transformer=QwenImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
    )


@pytest.fixture(scope="session")
def wan_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model base path with a tiny random Wan of every variant, in the layout of diffusers repositories."""
    base = tmp_path_factory.mktemp("wan_models")
    write_models(base)
    return base


@pytest.fixture(scope="session")
def wan_pairs(wan_models: Path) -> Callable[[str], WanPair]:
    """Return a variant of Wan, float32, loaded by both, once."""
    return cache(lambda name: load_pair(wan_models, KINDS[name]))


@pytest.fixture(params=KINDS)
def wan(request: pytest.FixtureRequest, wan_pairs: Callable[[str], WanPair]) -> WanPair:
    """Each kind of Wan model in turn."""
    return wan_pairs(request.param)


@pytest.fixture(scope="session")
def edit_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model base path with tiny random editing models of Qwen-Image."""
    base = tmp_path_factory.mktemp("edit_models")
    qwen_edit_models.write_models(base)
    return base


@pytest.fixture(scope="session")
def flux2_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model base path with tiny random FLUX.2 klein 4B and base 9B."""
    base = tmp_path_factory.mktemp("flux2_models")
    flux2_repositories.write_models(base)
    return base


@pytest.fixture(scope="session")
def edit_pairs(edit_models: Path) -> Callable[[str], EditPair]:
    """Return an editing model, float32, loaded by both, once."""
    return cache(lambda name: qwen_edit_models.load_pair(edit_models, qwen_edit_models.KINDS[name]))


@pytest.fixture(params=qwen_edit_models.KINDS)
def edit(request: pytest.FixtureRequest, edit_pairs: Callable[[str], EditPair]) -> EditPair:
    """Each kind of editing model in turn."""
    return edit_pairs(request.param)


@pytest.fixture(scope="session")
def flux2_pairs(flux2_models: Path) -> Callable[[str], Flux2Pair]:
    """Return a FLUX.2 klein, float32, loaded by both, once."""
    return cache(lambda name: flux2_repositories.load_pair(flux2_models, name))


@pytest.fixture(params=flux2_repositories.MODEL_IDS)
def flux2(request: pytest.FixtureRequest, flux2_pairs: Callable[[str], Flux2Pair]) -> Flux2Pair:
    """Each FLUX.2 klein in turn."""
    return flux2_pairs(request.param)


@pytest.fixture
def klein(flux2_pairs: Callable[[str], Flux2Pair]) -> Flux2Pair:
    """FLUX.2 klein 4B, where one model is enough."""
    return flux2_pairs("4B")


@pytest.fixture(scope="session")
def flux_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model base path with a tiny random FLUX.1 in both layouts."""
    base = tmp_path_factory.mktemp("flux_models")
    flux_repository.write_models(base)
    return base


@pytest.fixture(scope="session")
def flux_pairs(flux_models: Path) -> Callable[[str], FluxPair]:
    """Return a use of FLUX.1, float32, loaded by both, once."""
    return cache(lambda name: flux_repository.load_pair(flux_models, flux_repository.KINDS[name]))


@pytest.fixture(params=flux_repository.KINDS)
def flux(request: pytest.FixtureRequest, flux_pairs: Callable[[str], FluxPair]) -> FluxPair:
    """Each use of FLUX.1 in turn."""
    return flux_pairs(request.param)


@pytest.fixture
def complaints(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Warnings and errors logged by diffusers, transformers and peft, which do not propagate them to other handlers."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    caplog.clear()
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    for logger in loggers:
        logger.removeHandler(caplog.handler)
