from pathlib import Path

import pytest

from diffsynth_core.config.recipes import recipe_names
from diffsynth_core.hub.client import Repository
from diffsynth_core.hub.model_files import expand_entry, locate_folder
from diffsynth_core.hub.model_folder import is_shipped, model_folder, shipped_folder
from diffsynth_core.planning.model.required_files import files_of_recipe

SHIPPED = "diffsynth/shapes"


def test_a_shipped_model_does_not_depend_on_the_base_folder(tmp_path):
    (tmp_path / SHIPPED / "vae").mkdir(parents=True)
    folder = shipped_folder(SHIPPED)
    assert model_folder(SHIPPED, tmp_path) == Repository("model", SHIPPED).folder(tmp_path) == folder
    assert expand_entry(f"{SHIPPED}:vae/*.safetensors", tmp_path) == sorted((folder / "vae").glob("*.safetensors"))
    assert locate_folder(f"{SHIPPED}:tokenizer", tmp_path) == folder / "tokenizer"


@pytest.mark.parametrize(
    "model_id",
    ["Qwen/Qwen-Image", "shapes", "diffsynth/shape", "diffsynth/shapes/vae", "../models", "./shapes", "/", ""],
)
def test_other_models_are_below_the_base_folder(tmp_path, model_id):
    assert not is_shipped(model_id)
    assert model_folder(model_id, tmp_path) == tmp_path / model_id


def test_recipes_of_a_shipped_model_require_no_download():
    own = [name for name in recipe_names() if name.startswith("shapes-")]
    assert own == ["shapes-full", "shapes-lora"]
    assert [files_of_recipe(name) for name in own] == [[], []]


def test_every_shipped_model_has_a_recipe():
    folders = [path for path in shipped_folder("x/y").parents[1].glob("*/*") if path.is_dir()]
    assert [f"{path.parent.name}/{path.name}" for path in folders] == [SHIPPED]


def test_the_shipped_model_takes_at_most_5_mb():
    files = [path for path in shipped_folder(SHIPPED).rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= 5_000_000
    assert Path("README.md") in {path.relative_to(shipped_folder(SHIPPED)) for path in files}
