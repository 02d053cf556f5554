"""The commands that go on from a run do what they are for, as a shell takes them."""

import json
import shlex

import pytest

from diffsynth_core.checkpoints.run_folder import RECORD
from diffsynth_core.config.parameters import SETTINGS, as_plain
from diffsynth_core.config.resolve import resolve
from diffsynth_core.run_page.commands import next_commands, resume_command
from diffsynth_core.run_page.facts import read_run
from tests.run_folders import write_run


def _resolved(line: str) -> dict:
    """The parameters that a command line sets."""
    words = shlex.split(line.replace("\\\n", " "))
    assert words[:2] == ["diffsynth", "train"]
    flags, rest = {}, words[2:]
    while rest:
        name = rest.pop(0).removeprefix("--")
        if name.removeprefix("no-") in SETTINGS and SETTINGS[name.removeprefix("no-")].type_name == "bool":
            flags[name.removeprefix("no-")] = not name.startswith("no-")
        else:
            flags[name] = rest.pop(0)
    resolved = resolve(flags)
    assert not resolved.problems
    return as_plain(resolved.parameters)


@pytest.mark.parametrize("with_recipe", [True, False])
def test_a_run_resumes_with_its_parameters(tmp_path, with_recipe):
    folder = write_run(
        tmp_path / "a 'run'", 4, 9, lora_rank=7, use_gradient_checkpointing=False, dataset_base_path="it's"
    )
    record = read_run(folder).record
    recorded = record.parameters | ({} if with_recipe else {"recipe": "of-another-version"})
    line = resume_command(recorded, record.family, folder)
    assert ("--recipe qwen-image-lora" in line) is with_recipe
    assert ("--model_id_with_origin_paths" in line) is not with_recipe
    differing = {
        name: value
        for name, value in _resolved(line).items()
        if value != record.parameters[name] and name not in ("recipe", "output_path", "resume")
    }
    assert differing == {}
    assert _resolved(line)["output_path"] == str(folder) and _resolved(line)["resume"] == "auto"


def test_a_stage_resumes_in_its_folder_and_is_copied_where_it_was(tmp_path):
    """Resolving adds the name of the stage to its folder, mirror and repository."""
    flags = {"recipe": "wan2.2-t2v-a14b-lora", "only": "high", "output_path": str(tmp_path / "out"), "hub_public": True,
             "dataset_base_path": "clips", "mirror": "s3://bucket/out", "push_to_hub": "me/wan"}  # fmt: skip
    recorded = as_plain(resolve(flags).parameters)
    assert recorded["output_path"] == str(tmp_path / "out/high") and recorded["mirror"] == "s3://bucket/out/high"
    assert _resolved(resume_command(recorded, "wan", tmp_path / "out/high")) == recorded | {"resume": "auto"}


def test_what_belongs_to_the_command_and_not_to_the_run_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", 4, 9, profile=3, fit=True, max_time="3h")
    line = resume_command(read_run(folder).record.parameters, "qwen-image", folder)
    assert not [name for name in ("profile", "fit", "max_time", "dry_run") if name in line]


def test_a_parameter_that_this_version_does_not_know_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", 4, 9)
    record = read_run(folder).record
    assert "later" not in resume_command(record.parameters | {"of_later_versions": 1}, "qwen-image", folder)


@pytest.mark.parametrize(
    ("status", "changes", "expected"),
    [
        ("running", {}, ["run show", "generate", "convert-lora"]),
        ("completed", {}, ["generate", "convert-lora"]),
        ("interrupted", {}, ["train", "generate", "convert-lora"]),
        ("failed", {"trainable_models": "dit"}, ["train", "generate", "split-ckpt"]),
        ("interrupted", {"rehearse": True}, ["generate", "convert-lora"]),
    ],
)
def test_what_can_be_done_next(tmp_path, status, changes, expected):
    folder = write_run(tmp_path / "run", 4, 9, status, every=2, **changes)
    lines = [shlex.split(command.line.replace("\\\n", " ")) for command in next_commands(read_run(folder))]
    assert [" ".join(words[1:3] if words[1] == "run" else words[1:2]) for words in lines] == expected


def test_the_best_checkpoint_is_taken(tmp_path):
    folder = write_run(tmp_path / "run", 20, 20, "completed", every=4)
    facts = read_run(folder)
    assert facts.best.step < facts.latest_checkpoint.step
    assert facts.best.file in next_commands(facts)[-1].line
    content = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(content | {"best_checkpoint": None}))
    facts = read_run(folder)
    assert facts.latest_checkpoint.file in next_commands(facts)[-1].line


def test_a_lora_is_converted_to_another_format_than_it_has(tmp_path):
    folder = write_run(tmp_path / "run", 4, 4, "completed", every=2, lora_format="comfyui")
    assert "--to diffusers" in next_commands(read_run(folder))[-1].line
