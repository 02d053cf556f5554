"""Shared fixtures: tiny models in the real file layout, a dataset of photographs, the command line in process."""

import csv
import gc
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from diffsynth_cli import COLLECTIONS
from tests.loras import RECIPES, TinyFamily, write_images, write_tiny_family
from tests.naming import names
from tests.outcome import Outcome
from tests.snapshots import says  # noqa: F401 - a fixture
from tests.wan import PLACES as PLACES_OF_WAN

MODEL_ID = "Qwen/Qwen-Image"
PLACES = {
    "dit": "transformer/diffusion_pytorch_model*.safetensors",
    "text_encoder": "text_encoder/model*.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
ENTRIES = {component: f"{MODEL_ID}:{place}" for component, place in PLACES.items()}
CAPTIONS = {
    "astronaut": "an astronaut in an orange suit before a flag",
    "chelsea": "a cat",
    "coffee": "a cup of coffee with a spoon on a wooden table, seen from above",
    "rocket": "a rocket on its launch pad at night",
}


gc.set_threshold(*COLLECTIONS)  # as a command does


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declared here because pytest reads no other conftest early enough."""
    parser.addoption(
        "--measure",
        action="store_true",
        help="run tests/bench at full size and judge its ratios; otherwise it only runs",
    )


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """What a case expects to be named is its heading on the page of a test; a lambda is called as its argument is."""
    if getattr(val, "__name__", "") == "<lambda>":
        return argname
    if not isinstance(val, names):
        return None
    heading = " ".join(val.parts)
    return heading if len(heading) <= 48 else val.parts[0]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Keep tests from using the user's cache and from accessing hubs."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "1")
    patch.setenv("ACCELERATE_USE_CPU", "true")
    patch.setenv("COLUMNS", "80")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model base path with a tiny random Qwen-Image."""
    from diffsynth_core.models.registry import load_family

    base = tmp_path_factory.mktemp("models")
    for component, place in PLACES.items():
        load_family("qwen-image").write_tiny_weights(base, component, MODEL_ID, place)
    return base


@pytest.fixture(scope="session")
def entry_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write tiny models for entries `model_id:file`; return the model base path, one for all."""
    from diffsynth_core.hub.model_files import split_entry
    from diffsynth_core.models.recognition import component_at, family_of_model
    from diffsynth_core.models.registry import load_family

    base = tmp_path_factory.mktemp("entry_models")
    written: set[str] = set()

    def write(*entries: str) -> Path:
        for entry in entries:
            if entry not in written:
                model_id, place = split_entry(entry)
                facts = family_of_model(model_id)
                component = component_at(place, facts)
                load_family(facts.name).write_tiny_weights(base, component.name, model_id, place)
                written.add(entry)
        return base

    return write


@pytest.fixture(scope="session")
def recipe_models(entry_models: Callable[..., Path]) -> Callable[..., Path]:
    """Write tiny models for recipes; return the model base path, one for all."""
    from diffsynth_core.config.resolve import resolve

    def write(*recipes: str) -> Path:
        entries = [resolve({"recipe": recipe}).parameters.model_id_with_origin_paths for recipe in recipes]
        return entry_models(*(entry for named in entries for entry in named))

    return write


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model base path with tiny models of Wan, each in the layout of its repository."""
    from diffsynth_core.models.registry import load_family

    base = tmp_path_factory.mktemp("wan")
    for model_id, places in PLACES_OF_WAN.items():
        for component, place in places.items():
            load_family("wan").write_tiny_weights(base, component.removeprefix("low-noise "), model_id, place)
    return base


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of four photographs of 64 x 64 pixels with captions of different lengths."""
    import skimage.data
    from PIL import Image

    folder = tmp_path_factory.mktemp("photographs")
    for name in CAPTIONS:
        Image.fromarray(getattr(skimage.data, name)()[..., :3]).resize((64, 64)).save(folder / f"{name}.png")
    write_metadata(folder, [(f"{name}.png", caption) for name, caption in CAPTIONS.items()])
    return folder


@pytest.fixture(scope="session")
def tiny_families(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Callable[[str], TinyFamily]:
    """A tiny model of each family, written once, with the photographs to train it on."""
    images = tmp_path_factory.mktemp("images")
    write_images(images, photographs)

    @cache
    def find(name: str) -> TinyFamily:
        base = tmp_path_factory.mktemp(name)
        write_tiny_family(name, base)
        return TinyFamily(name, base, images)

    return find


@pytest.fixture(params=RECIPES)
def tiny(request: pytest.FixtureRequest, tiny_families: Callable[[str], TinyFamily]) -> TinyFamily:
    """Each family in turn."""
    return tiny_families(request.param)


def write_metadata(folder: Path, rows: list[tuple[str, str]]) -> None:
    """A metadata.csv with images and captions."""
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("image", "prompt"), *rows])


@pytest.fixture
def dataset(photographs: Path, tmp_path: Path) -> Path:
    """A copy of the photographs that a test may damage."""
    return Path(shutil.copytree(photographs, tmp_path / "dataset"))


@pytest.fixture
def models(tiny_models: Path, tmp_path: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny models that a test may damage; the model base path of `cli`."""
    copy = Path(shutil.copytree(tiny_models, tmp_path / "models"))
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(copy))
    return copy


@pytest.fixture
def cli(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run `diffsynth …` in this process, in an empty folder, with the tiny models as the model base path."""
    from diffsynth_cli.main import main

    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_models))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def train_into(cli: Callable[..., Outcome], photographs: Path) -> Callable[..., Path]:
    """Train on the photographs with the given flags, and return the folder of the run."""

    def run(folder: str, *flags: object) -> Path:
        outcome = cli("train", "--dataset_base_path", photographs, "--output_path", folder, *flags)
        assert outcome.code == 0, outcome.err
        return Path(folder)

    return run
