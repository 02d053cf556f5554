"""Help and flags: names are not truncated, every flag can be turned off, both spellings work, help imports little."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from diffsynth_core.config.parameters import GROUPS, SETTINGS
from diffsynth_core.config.recipes import NOT_IN_RECIPES

FLAGS = [name for name, setting in SETTINGS.items() if setting.type_name == "bool"]
VALUES = {
    "int": 256,
    "float": 0.5,
    "path": "some/path",
    "memory": "24GB",
    "duration": "3h50m",
    "blocks": "auto",
    "str": "text",
    "comma list": "a,b",
    "number pair": "0.9,0.99",
    "arguments": "fused=true",
    "quant options": "a:b:nf4",
    "split": "0.25",
    "json list": '["a", ["b"]]',
}


def test_help_names_the_commands(cli):
    outcome = cli("--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("Usage: diffsynth [OPTIONS] COMMAND [ARGS]...\n")
    reported = " ".join(outcome.out.split())
    assert "train Train from a recipe: LoRA, full, or both" in reported
    assert "download Download files of recipes, models and datasets" in reported
    assert "convert-lora Convert a LoRA to the format of another program" in reported
    assert "recipe List and show recipes, print their JSON schema" in reported


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["-h"],
        ["train", "-h"],
        ["recipe", "-h"],
        ["recipe", "show", "-h"],
        ["run", "show", "-h"],
        ["convert-lora", "-h"],
    ],
)
def test_help_is_data_and_no_wider_than_80(cli, arguments):
    outcome = cli(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("Usage: diffsynth")
    assert [line for line in outcome.out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("columns", ["80", "60", "200"])
def test_help_of_train_shows_every_name_whole(cli, monkeypatch, columns):
    """Typer truncates long names with an ellipsis by default."""
    monkeypatch.setenv("COLUMNS", columns)
    lines = cli("train", "--help").out.splitlines()
    shown = [re.fullmatch(r"  (--[a-z0-9_]+)((?:, --no-[a-z0-9_]+)?)(?:, -[a-z])?( [^-].*)?", line) for line in lines]
    heads = {match[1]: match[2] for match in shown if match and match[1] != "--help"}
    assert heads == {f"--{name}": f", --no-{name}" if name in FLAGS else "" for name in SETTINGS}
    assert max(map(len, lines)) <= 80


def test_help_of_train_shows_the_groups_in_order(cli):
    lines = cli("train", "--help").out.splitlines()
    titles = [line.removesuffix(":") for line in lines if line.removesuffix(":") in GROUPS.values()]
    assert titles == list(GROUPS.values())


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("lora_rank", "LoRA rank; alpha equals rank [default: 32]"),
        ("max_steps", "stages; default: train all epochs (rehearsal: 8 steps) [unit:"),
        (
            "num_frames",
            "the largest 4n + 1 that it has [default: 81; unit: frames; only wan]",
        ),
        ("preset_lora_model", "Component to merge the LoRA of `preset_lora_path` into"),
        ("data_file_keys", "JSON list of paths [default: image,video]"),
        ("task", "direct_distill:data_process | direct_distill:train"),
    ],
)
def test_help_tells_default_unit_family_and_choices(cli, name, line):
    text = cli("train", "--help").out
    block = re.search(rf"^  --{name}\b.*\n(?:      .*\n)+", text, re.MULTILINE)
    assert block and line in [text.strip() for text in block[0].splitlines()]


def test_version(cli):
    outcome = cli("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"diffsynth {version('diffsynth-cli')}\n", "")


@pytest.mark.parametrize("arguments", [[], ["recipe"]])
def test_a_command_left_out_shows_the_usage(cli, arguments):
    """Not an error with a hint: the usage itself lists the commands."""
    outcome = cli(*arguments)
    text = outcome.out + outcome.err
    assert outcome.code == 2
    assert text.startswith(" ".join(["Usage: diffsynth", *arguments, "[OPTIONS] COMMAND"]))
    assert "hint:" not in text


@pytest.mark.parametrize(
    ("arguments", "near"),
    [(["trian"], "train"), (["recipe", "shw"], "show"), (["recipe", "list", "--fromat", "json"], "--format")],
)
def test_a_slip_of_the_pen_in_a_command(cli, arguments, near):
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: No such {'option' if '--format' in near else 'command'}")
    assert near in outcome.err and "Traceback" not in outcome.err


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_has_a_form_that_turns_it_off(parse, config, name):
    """Overriding a file that turns it on, where files may; otherwise after itself."""
    on = ("--config", config(f"parameters:\n  {name}: true\n")) if name not in NOT_IN_RECIPES else (f"--{name}",)
    dashes = name.replace("_", "-")
    assert getattr(parse(*on).parameters, name) is True
    for off in (f"--no-{name}", f"--no-{dashes}", f"--no_{name}", f"--no_{dashes}"):
        assert getattr(parse(*on, off).parameters, name) is False, off


def test_flags_of_a_recipe_are_turned_off(parse):
    assert parse("--recipe", "qwen-image-lora").parameters.use_gradient_checkpointing
    resolved = parse("--recipe", "qwen-image-lora", "--no-use-gradient-checkpointing", "--no-find_unused_parameters")
    assert not resolved.parameters.use_gradient_checkpointing
    assert not resolved.parameters.find_unused_parameters
    assert resolved.problems == ()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--find_unused_parameters", "--no-find-unused-parameters"], False),
        (["--no_find_unused_parameters", "--find-unused-parameters"], True),
    ],
)
def test_the_last_of_two_goes(parse, arguments, expected):
    assert parse(*arguments).parameters.find_unused_parameters is expected


@pytest.mark.parametrize("separator", ["_", "-"])
def test_every_option_in_both_spellings(parse, config, separator):
    given = {**{name: value_of(name) for name in SETTINGS}, "config": config("parameters: {}")}
    arguments = []
    for name, value in given.items():
        option = f"--{name.replace('_', separator)}"
        arguments += [option] if name in FLAGS else [option, value]
    resolved = parse(*arguments)
    assert {name: str(resolved.origin(name)) for name in SETTINGS} == {name: f"`--{name}`" for name in SETTINGS}
    assert not [problem for problem in resolved.problems if "is not a parameter" in problem.message]
    assert not resolved.invalid


def value_of(name: str) -> object:
    """Return a valid value of the parameter."""
    if name == "recipe":
        return "qwen-image-lora"
    setting = SETTINGS[name]
    return setting.choices[0] if setting.choices else VALUES.get(setting.type_name)


@pytest.mark.parametrize("argument", ["--lora_rank=7", "--lora-rank=7"])
def test_a_value_behind_an_equals_sign(parse, argument):
    assert parse(argument).parameters.lora_rank == 7


def test_the_dry_run_shows_what_flags_changed_and_writes_nothing(cli, dataset):
    start = ("train", "--recipe", "qwen-image-lora", "--dataset_base_path", dataset, "--device", "cpu", "--dry_run")
    outcome = cli(*start, "--lora-rank", 4, "--mixed-precision", "bf16", "--max-steps", 3)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("Model     Qwen-Image on cpu in bf16\n")
    assert "LoRA of rank 4 on 21 modules" in outcome.out and "\nSteps     3 steps " in outcome.out
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "light"),
    [
        (["--help"], ["torch", "pydantic", "rich", "yaml", "numpy"]),
        (["--version"], ["torch", "rich", "yaml", "numpy"]),
        (["train", "--help"], ["torch", "rich", "numpy"]),
        (["download", "--help"], ["torch", "rich", "numpy", "modelscope_hub", "huggingface_hub"]),
        (["recipe", "list"], ["torch", "rich", "numpy"]),
        (["recipe", "show", "qwen-image-lora"], ["torch", "rich", "numpy"]),
        (["recipe", "schema"], ["torch", "rich", "numpy"]),
    ],
)
def test_heavy_modules_are_not_imported(arguments, light):
    command = [sys.executable, "-X", "importtime", "-m", "diffsynth_cli", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    imported = {
        line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")
    }
    assert ended.returncode == 0, ended.stderr[-500:]
    assert {"diffsynth_cli.main", "typer"} <= imported
    assert imported & set(light) == set()


@pytest.mark.parametrize("module", ["typer", "diffsynth_core.planning.plan"])
def test_ctrl_c_while_modules_are_imported(module, tmp_path):
    """The signal arrives while `module` is looked up, in the real entry point."""
    script = (
        "import signal, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from diffsynth_cli.__main__ import run\n"
        "sys.argv[1:] = ['train', '--recipe', 'qwen-image-lora']\n"
        "sys.exit(run())\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "Interrupted\n")
