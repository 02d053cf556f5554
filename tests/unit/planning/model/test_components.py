"""Components of a plan without files, and recipe entries that local files replace."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffsynth_core.config.resolve import Resolved, resolve
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.errors import Problem, collect_problems
from diffsynth_core.planning.data.two_stage import components_of
from diffsynth_core.planning.model.components import find_components
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.planning.model.replaced import drop_replaced_entries
from diffsynth_core.planning.model.required_files import files_of_stages
from tests.cli.test_documented_commands import ACCEPTED, Command, named
from tests.conftest import ENTRIES, MODEL_ID


def find(resolved: Resolved, base: Path) -> tuple[ModelPlan, list[Problem]]:
    with collect_problems(missing_apart=True) as problems:
        found = find_components(resolved.parameters, resolved.family, base)
    assert found, problems
    return found, problems


@pytest.mark.parametrize("command", ACCEPTED, ids=named)
def test_the_plan_of_each_documented_command_is_whole_without_files(command: Command, tmp_path):
    """Each component of the variant is planned, with its published size."""
    found, problems = find(resolve(command.values), tmp_path)
    assert problems == []
    needed = components_of(TASKS[str(command.values.get("task", "sft"))], found.variant) & {*found.variant.components}
    assert found.components.keys() >= needed
    assert [name for name, known in found.published.items() if not known.parameters] == []
    if "dit" in needed:
        assert found.shapes["dit"]


def test_a_component_of_unknown_size_is_in_the_plan(tmp_path):
    entries = "Wan-AI/Wan2.9-Next-99B:diffusion_pytorch_model*.safetensors,Wan-AI/Wan2.9-Next-99B:Wan2.1_VAE.pth"
    found, _ = find(resolve({"model_id_with_origin_paths": entries, "lora_base_model": "dit"}), tmp_path)
    assert found.components.keys() == {"dit", "vae"}
    assert found.published["dit"].parameters == 0


@pytest.fixture
def mine(tiny_models: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Qwen-Image in a user's folder."""
    return Path(shutil.copytree(tiny_models / MODEL_ID, tmp_path / "mine"))


@pytest.fixture
def given(mine: Path) -> Callable[..., Resolved]:
    """Return the recipe with local paths, without the entries that they replace."""

    def run(*paths: object, **more: object) -> Resolved:
        text = json.dumps([str(mine / str(path)) for path in paths])
        return drop_replaced_entries(resolve({"recipe": "qwen-image-lora", "model_paths": text, **more}))

    return run


@pytest.mark.parametrize(
    ("paths", "left"),
    [
        (("transformer", "text_encoder", "vae"), ()),
        (("transformer",), ("text_encoder", "vae")),
        (("vae", "text_encoder"), ("dit",)),
        ((".",), ()),
        (
            [f"transformer/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)],
            ("text_encoder", "vae"),
        ),
        (("nowhere",), ("dit", "text_encoder", "vae")),
    ],
)
def test_files_given_by_hand_replace_the_entries_of_their_components(given, paths, left):
    resolved = given(*paths)
    assert resolved.parameters.model_id_with_origin_paths == tuple(ENTRIES[name] for name in left)


def test_what_is_replaced_is_told_by_what_files_hold_not_by_their_names(given, mine):
    (mine / "vae").rename(mine / "text-encoder-v2")
    assert given("text-encoder-v2").parameters.model_id_with_origin_paths == (ENTRIES["dit"], ENTRIES["text_encoder"])


def test_nothing_is_wanted_of_the_hubs_that_is_not_used(given, mine):
    assert files_of_stages([given("transformer", "text_encoder", "vae")]) == []
    some = files_of_stages([given("transformer", "vae")])
    assert {str(item) for item in some} == {
        ENTRIES["text_encoder"],
        f"{MODEL_ID}:text_encoder/config.json",
        f"{MODEL_ID}:tokenizer/*",
    }
    shutil.rmtree(mine / "tokenizer")
    (last,) = files_of_stages([given("transformer", "text_encoder", "vae")])
    assert str(last) == f"{MODEL_ID}:tokenizer/*"


def test_what_other_parameters_call_an_entry_means_the_files_in_its_place(given, mine):
    resolved = given("transformer", fp8_models=f"{ENTRIES['dit']},{ENTRIES['vae']}")
    assert resolved.parameters.fp8_models == (str(mine / "transformer"), ENTRIES["vae"])


def test_entries_that_are_given_as_near_as_the_paths_stay(given, mine, tiny_models):
    """Both on the command line contradict each other, which remains a problem."""
    entries = ",".join(ENTRIES.values())
    resolved = given("transformer", model_id_with_origin_paths=entries)
    assert resolved.parameters.model_id_with_origin_paths == tuple(ENTRIES.values())
    _, problems = find(resolved, tiny_models)
    assert [problem.message for problem in problems] == [
        f"`{ENTRIES['dit']}` and `{mine}/transformer` are both the dit of Qwen-Image"
    ]
