"""`generate`: what it refuses, all at once and before anything loads, and what a dry run prints."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth_core.config.resolve import resolve_stages
from diffsynth_core.drawing import Drawing
from diffsynth_core.generation.memory import find_storage, weights_at_once
from diffsynth_core.generation.request import GenerationRequest
from tests.cli.conftest import HubAccessError, read_problems, stamps
from tests.clips import numbered, write_clip
from tests.conftest import MODEL_ID, PLACES
from tests.loras import random_lora, save_lora
from tests.naming import in_any_order, names
from tests.recorded_runs import record_run

QWEN = ("--recipe", "qwen-image-lora", "--device", "cpu")
EDIT = ("--recipe", "qwen-image-edit-lora", "--device", "cpu")
SMALL = ("--height", 64, "--width", 64)


@pytest.fixture
def refuse(cli, says, tmp_path: Path) -> Callable[..., HubAccessError]:
    """Draw something that must be refused before anything loads, writing nothing."""

    def run(*arguments: object) -> HubAccessError:
        before = stamps(tmp_path)
        outcome = cli("generate", *arguments)
        assert outcome.code != 0, "was not refused"
        assert "Traceback" not in outcome.err and "Loading" not in outcome.err and outcome.out == ""
        assert stamps(tmp_path) == before
        says(f"exit code {outcome.code}\n{outcome.err}")
        return outcome.code, read_problems(outcome.err)

    return run


@pytest.fixture
def lora(tiny_families, tmp_path) -> Path:
    """A LoRA for the tiny Qwen-Image."""
    shapes = tiny_families("qwen-image").module_shapes()
    return save_lora(tmp_path / "style.safetensors", random_lora(shapes), "qwen-image", "diffsynth")


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "cat.png"
    Image.new("RGB", (96, 96), "orange").save(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), ("no prompt given", "--prompts")),
        (("--prompt", "a", "--steps", "0"), (names("steps", "at least 1", "0"), None)),
        (("--prompt", "a", "--steps", "2.5"), (names("steps", "integer", "2.5"), None)),
        (("--prompt", "a", "--steps", "1e9"), (names("steps", "at most 10000", "1e9"), None)),
        (("--prompt", "a", "--cfg_scale", "0.5"), (names("cfg_scale", "at least 1", "0.5"), None)),
        (("--prompt", "a", "--cfg-scale", "nan"), (names("cfg_scale", "a number", "nan"), None)),
        (("--prompt", "a", "--guidance", "3"), (names("guidance", "Qwen-Image"), names("--cfg_scale"))),
        (("--prompt", "a", "--seed", "-1"), (names("seed", "at least 0", "-1"), None)),
        (("--prompt", "a", "--height", "64"), (names("height", "width"), names("--width"))),
        (
            ("--prompt", "a", "--height", "100", "--width", "64"),
            (names("height", "100", "16", "Qwen-Image"), names("--height 96")),
        ),
        (
            ("--prompt", "a", "--height", "65536", "--width", "65536"),
            (names("65536 x 65536", "1328 x 1328", "Qwen-Image"), names("--height", "--width")),
        ),
        (("--prompt", "a", "--num_frames", "5"), (names("num_frames", "qwen-image", "wan"), "remove it")),
        (
            ("--prompt", "a", "--negative_prompt", "b", "--cfg_scale", "1"),
            (names("--negative_prompt", "cfg_scale", "1"), names("--cfg_scale")),
        ),
        (("--prompt", "a", "--lora", "gone.safetensors"), (names("--lora", "gone.safetensors"), names("LoRA"))),
        (("--prompt", "a", "--checkpoint", "gone.safetensors"), (names("--checkpoint", "gone.safetensors"), names("checkpoint"))),
        (("--prompt", "a", "--input_image", "x.png"), (names("--input_image", "Qwen-Image"), names("--edit_image"))),
        (("--prompt", "a\udcff"), (names("--prompt", "1", "U+DCFF"), "remove it")),
        (("--prompt", "a", "--stepz", "3"), (names("--stepz", "generate"), names("--steps"))),
        (("--prompt", "a", "--lora_rank", "3"), (names("--lora_rank", "train"), "remove it")),
        (("--prompt", "a", "--run", "nowhere", "--recipe", "qwen-image-lora"), (names("--run", "nowhere"), names("run.json"))),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) and all(isinstance(one, str) for one in value) else "",
)  # fmt: skip
def test_wrong_options(refuse, arguments, problem):
    message, hint = problem
    if isinstance(message, str):
        message, hint = names(message), names(hint)
    recipe = () if "--recipe" in arguments else QWEN
    assert (message, hint) in refuse(*recipe, *arguments)[1]


def test_all_problems_come_together(refuse):
    code, problems = refuse(
        *QWEN, "--steps", 0, "--cfg_scale", 0, "--lora", "no.safetensors", "--edit_image", "no.png", "--height", 100,
        "--width", 100, "--prompts", "no.csv", "--guidance", "x",
    )  # fmt: skip
    assert code == 2
    found = [message for message, _ in problems]
    assert found == in_any_order(
        names("steps"), names("cfg_scale"), names("no.safetensors"), names("no.png"), names("height"),
        names("width"), names("no.csv"), names("guidance", "number", "x"), names("guidance", "embedder"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", b"", [(names("{path}", "no prompts"), names("one prompt per line"))]),
        ("p.txt", b" \n\n", [(names("{path}", "no prompts"), names("one prompt per line"))]),
        ("p.txt", b"caf\xe9\n", [(names("{path}", "UTF-8"), names("UTF-8"))]),
        ("p.csv", b"", [(names("{path}"), names("row"))]),
        ("p.csv", b"prompt\n", [(names("{path}"), names("row"))]),
        ("p.csv", b"text\na\n", [(names("{path}", "prompt", "text"), names("prompt"))]),
        ("p.csv", b"prompt,sed\na,1\n", [(names("{path}", "sed"), names("seed"))]),
        ("p.csv", b"prompt,seed\na,1.5\nb,-2\n", [(names("row 1", "seed", "1.5"), names("empty")), (names("row 2", "seed", "-2"), names("empty"))]),
        ("p.csv", b"prompt,seed\n,1\n", [(names("row 1", "prompt"), names("row"))]),
        ("p.csv", b'prompt\n"a\n', [(names("{path}", "line 2"), names("quote"))]),
        ("p.json", b'{"prompt": "a"}', [(names("{path}", "list"), names("object"))]),
        ("p.json", b'[{"prompt": 5}]', [(names("row 1", "prompt"), names("prompt"))]),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"\n', [(names("{path}", "line 2"), names("line"))]),
        ("p.jsonl", b'{"prompt": "a", "edit_image": 5}\n', [(names("row 1", "edit_image", "5"), names("path"))]),
        ("p.yaml", b"- a\n", [(names("{path}", ".txt", ".csv", ".json", ".jsonl"), names("file"))]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_wrong_prompts_files(refuse, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    path = tmp_path / name
    filled = [(message.format(path=path), hint) for message, hint in expected]
    assert refuse(*QWEN, "--prompts", path)[1] == filled


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_prompts_file_that_may_not_be_read(refuse, tmp_path):
    path = tmp_path / "p.txt"
    path.touch(mode=0)
    assert refuse(*QWEN, "--prompts", path)[1] == [(names(path, "cannot be read"), names("permissions"))]


@pytest.mark.parametrize("weight", ["x", "0.5,inf"])
def test_wrong_weights(refuse, lora, weight):
    text = f"{lora}:{weight}"
    assert refuse(*QWEN, "--prompt", "a", "--lora", text)[1] == [(names("--lora", text, "finite"), names("0.8"))]


def test_several_weights_need_a_grid(refuse, lora):
    expected = [(names(lora, "several weights"), names("--grid"))]
    assert refuse(*QWEN, "--prompt", "a", "--lora", f"{lora}:0,1")[1] == expected


def test_one_lora_twice(refuse, lora, tmp_path):
    again = tmp_path / "." / "style.safetensors"
    problems = refuse(*QWEN, "--prompt", "a", "--lora", lora, "--lora", f"{again}:0.5")[1]
    assert problems == [(names(lora, "twice"), names("sum"))]


def test_two_loras_that_vary(refuse, lora, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(lora.read_bytes())
    problems = refuse(*QWEN, "--prompt", "a", "--grid", "--lora", f"{lora}:0,1", "--lora", f"{other}:0,1")[1]
    assert problems == [(names(lora, other), names("one LoRA"))]


def test_a_lora_of_another_family(refuse, tiny_families, tmp_path):
    shapes = tiny_families("flux2").module_shapes()
    path = save_lora(tmp_path / "klein.safetensors", random_lora(shapes), "flux2", "diffusers")
    problems = refuse(*QWEN, "--prompt", "a", "--lora", path)[1]
    assert problems == [(names(path, "FLUX.2", "Qwen-Image"), names("this model"))]


def test_a_lora_that_fits_no_module(refuse, lora):
    save_file({f"x{key}": tensor for key, tensor in load_file(lora).items()}, lora)
    assert refuse(*QWEN, "--prompt", "a", "--lora", lora)[1] == [(names(lora, "no module"), names("LoRA"))]


def test_a_lora_as_a_checkpoint(refuse, lora):
    problems = refuse(*QWEN, "--prompt", "a", "--checkpoint", lora)[1]
    assert problems == [(names(lora, "LoRA"), names("--lora", lora))]


def test_a_checkpoint_of_several_components(refuse, tiny_models, tmp_path):
    tensors = {}
    for component in ("dit", "vae"):
        for path in (tiny_models / MODEL_ID).glob(PLACES[component]):
            tensors |= {f"pipe.{component}.{key}": tensor for key, tensor in load_file(path).items()}
    save_file(tensors, tmp_path / "both.safetensors")
    problems = refuse(*QWEN, "--prompt", "a", "--checkpoint", tmp_path / "both.safetensors")[1]
    assert problems == [(names(tmp_path / "both.safetensors", "pipe.dit.", "pipe.vae."), names("diffsynth split-ckpt"))]


def test_a_part_of_a_component_as_a_checkpoint(refuse, tmp_path):
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.zeros(2, 2)}, tmp_path / "part.safetensors")
    problems = refuse(*QWEN, "--prompt", "a", "--checkpoint", tmp_path / "part.safetensors")[1]
    assert problems == [
        (
            names(tmp_path / "part.safetensors", "Qwen-Image", "transformer_blocks.0.attn.to_q.weight"),
            names("all weights"),
        )
    ]


@pytest.fixture
def edit_models(recipe_models, monkeypatch) -> Path:
    base = recipe_models("qwen-image-edit-lora", "qwen-image-lora")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(base))
    return base


def test_images_that_an_editing_model_cannot_read(cli, edit_models, refuse, image, tmp_path):
    """After `cli`, whose models are others."""
    (tmp_path / "torn.png").write_bytes(image.read_bytes()[:60])
    table = tmp_path / "p.jsonl"
    rows = [
        {"prompt": "a", "edit_image": ["cat.png", "cat.png"]},
        {"prompt": "b", "edit_image": "torn.png"},
        {"prompt": "c"},
        {"prompt": "d", "edit_image": "gone.png"},
        {"prompt": "e", "edit_image": "cat.png", "kontext_images": "cat.png"},
    ]
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    problems = refuse(*EDIT, "--prompts", table)[1]
    assert problems == in_any_order(
        (names("row 1", "edit_image", "one image", "2"), names("one image")),
        (names("row 2", "edit_image", tmp_path / "torn.png"), names("another image")),
        (names("row 3", "edit_image"), names("--edit_image", "--extra_inputs")),
        (names("row 4", "edit_image", tmp_path / "gone.png"), names("path")),
        (names("row 5", "kontext_images", "Qwen-Image-Edit"), names("edit_image")),
    )


def test_an_editing_model_without_an_image(cli, edit_models, refuse):
    problems = refuse(*EDIT, "--prompt", "a", "--prompt", "b")[1]
    assert problems == [(names("Qwen-Image-Edit", "edit_image"), names("--edit_image", "--extra_inputs"))]


def test_clips_of_a_wrong_length_without_the_first_frame(cli, recipe_models, refuse, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(recipe_models("wan2.1-i2v-14b-480p-lora")))
    recipe = ("--recipe", "wan2.1-i2v-14b-480p-lora", "--device", "cpu")
    problems = refuse(*recipe, "--prompt", "a", "--num_frames", 6)[1]
    assert problems == in_any_order(
        (names("num_frames", "6", "4n + 1"), names("--num_frames 5", "9")),
        (names("Wan", "input_image"), names("--input_image")),
    )


def test_a_clip_whose_first_frame_cannot_be_decoded(cli, recipe_models, refuse, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(recipe_models("wan2.1-i2v-14b-480p-lora")))
    torn = write_clip(tmp_path / "torn.mp4", numbered(3))
    torn.write_bytes(torn.read_bytes()[:200])
    recipe = ("--recipe", "wan2.1-i2v-14b-480p-lora", "--device", "cpu", "--prompt", "a")
    assert refuse(*recipe, "--input_image", torn)[1] == [(names("--input_image", torn), names("another image"))]


def test_an_output_folder_with_files(refuse, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "0001.png").touch()
    (tmp_path / "out-2").mkdir()
    expected = [(names(folder, "0001.png"), names(f"--out {tmp_path / 'out-3'}"))]
    assert refuse(*QWEN, "--prompt", "a", "--out", folder)[1] == expected


def test_a_file_in_place_of_the_output_folder(refuse, tmp_path):
    (tmp_path / "out").touch()
    assert refuse(*QWEN, "--prompt", "a", "--out", tmp_path / "out")[1] == [
        (names("out", tmp_path / "out", "file"), names("folder"))
    ]


def test_stages_that_are_no_two_denoisers(refuse, config):
    path = config("extends: qwen-image-lora\nstages: {one: {parameters: {seed: 1}}, two: {parameters: {seed: 2}}}\n")
    problems = refuse("--config", path, "--device", "cpu", "--prompt", "a")[1]
    assert problems == [(names("one, two"), names("--only"))]


def test_a_lora_for_a_second_transformer_that_there_is_not(refuse, lora):
    problems = refuse(*QWEN, "--prompt", "a", "--lora_dit2", lora)[1]
    assert problems == [(names(lora, "second", "Qwen-Image"), names("--lora"))]


def test_a_folder_that_is_no_run(refuse, tmp_path):
    assert refuse("--run", tmp_path)[1] == [(names("--run", str(tmp_path)), names("run.json"))]


def test_a_damaged_record(refuse, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    assert refuse("--run", tmp_path / "run")[1] == [(names(tmp_path / "run" / "run.json"), names("folder of a run"))]


def test_a_run_without_checkpoint_and_dataset(refuse, tmp_path):
    run = record_run(tmp_path / "run", tmp_path / "gone")
    problems = refuse("--run", run, "--device", "cpu", "--recipe", "qwen-image-lora")[1]
    assert problems == in_any_order(
        (names("--run", run / "run.json", "--recipe"), names("remove one")),
        (names(run, "no checkpoint"), names("--lora", "--checkpoint")),
        (names("captions", tmp_path / "gone"), names("--prompt")),
    )


def test_checkpoints_with_lora_and_full_weights(refuse, lora, photographs, tmp_path):
    run = record_run(tmp_path / "run", photographs, trainable_models=["vae"])
    problems = refuse("--run", run, "--device", "cpu")[1]
    assert problems == [(names("LoRA of dit", "full weights of vae"), names("diffsynth split-ckpt"))]


def test_a_dry_run_prints_what_would_be_drawn(cli, says, lora, tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,negative_prompt,seed,image\na cat,,7,unused.png\na dog,blurry,,\n")
    outcome = cli("generate", *QWEN, *SMALL, "--prompts", table, "--prompt", "a fox", "--lora", f"{lora}:0.5",
                  "--seed", 40, "--steps", 4, "--dry_run", "--gpu_memory", "24GB")  # fmt: skip
    assert outcome.code == 0 and not outcome.err
    says(outcome)
    assert outcome.out == names(f"{lora}: 0.5")
    assert not list(Path().iterdir()), "nothing is written"


def test_seeds_negative_prompts_and_labels_as_json(cli, lora, tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,negative_prompt,seed\na cat,,7\na dog,blurry,\n")
    outcome = cli("generate", *QWEN, *SMALL, "--prompt", "", "--prompts", table, "--lora", f"{lora}:0,0.5,1",
                  "--grid", "--seed", 40, "--negative-prompt", "ugly", "--dry_run", "--format", "json")  # fmt: skip
    content = json.loads(outcome.out)
    assert (content["written"], content["grid"]) == (False, "generated/qwen-image-lora/grid.png")
    found = [(one["path"][-8:], one["prompt"], one["negative_prompt"], one["seed"], one["loras"][0]["weight"])
             for one in content["images"]]  # fmt: skip
    assert found == [
        *((f"000{number + 1}.png", "", "ugly", 40, weight) for number, weight in enumerate((0, 0.5, 1))),
        *((f"000{number + 4}.png", "a cat", "ugly", 7, weight) for number, weight in enumerate((0, 0.5, 1))),
        *((f"000{number + 7}.png", "a dog", "blurry", 42, weight) for number, weight in enumerate((0, 0.5, 1))),
    ]


def test_weights_are_counted_for_a_gpu_unless_the_cpu_is_asked_for(cli):
    """In bfloat16 there, on whatever machine the plan is made."""
    drawn = ("generate", *QWEN[:2], "--prompt", "a", "--dry_run", "--gpu_memory")
    limit = cli(*drawn, "24GB").out.partition("Memory")[2].split()
    assert limit[2:7] == ["of", "weights", "on", "the", "GPU"]
    on_cpu = cli(*drawn, "24GB", "--device", "cpu").out.partition("Memory")[2].split()
    assert limit[1] == on_cpu[1] and float(on_cpu[0]) == pytest.approx(2 * float(limit[0]), rel=0.05)


def test_weights_that_do_not_fit(cli, says):
    outcome = cli("generate", *QWEN, "--prompt", "a", "--dry_run", "--gpu_memory", "0.001GB")
    assert outcome.code == 3 and "the weights do not fit" in outcome.out
    says(outcome)
    assert "8-bit floats (`--fp8_models`) either" in " ".join(outcome.out.split())


@pytest.mark.parametrize(("recipe", "component"), [("qwen-image-lora", "dit"), ("wan2.2-t2v-a14b-lora", "dit2")])
def test_the_flag_that_makes_weights_fit_does(cli, entry_models, monkeypatch, recipe, component):
    """The one flag may name the transformer of either stage."""
    stages = resolve_stages({"recipe": recipe})
    base = entry_models(*(entry for one in stages for entry in one.parameters.model_id_with_origin_paths))
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(base))
    generation = Drawing.of(GenerationRequest(prompts=("a",)), recipe=recipe, device="cpu").plan()
    limit = max(weights_at_once(generation).values()) - 50_000
    option = find_storage(generation, limit)
    assert option.components == (component,) and option.peak < limit
    drawn = ("generate", "--recipe", recipe, "--prompt", "a", "--device", "cpu", "--dry_run", "--gpu_memory")
    outcome = cli(*drawn, f"{limit / 2**20:.6f}MB")
    shown = " ".join(outcome.out.split())
    assert outcome.code == 3 and "the weights do not fit" in shown
    flag = shown.partition(" at most, pass `")[2].partition("`")[0]
    assert flag == option.flag
    again = cli(*drawn, f"{limit / 2**20:.6f}MB", *shlex.split(flag))
    assert again.code == 0 and "the weights fit" in " ".join(again.out.split()), again.out


def test_a_run_gives_model_size_checkpoint_and_captions(cli, says, lora, photographs, tmp_path):
    run = record_run(tmp_path / "mine", photographs)
    outcome = cli("generate", "--run", run, "--device", "cpu", "--dry_run")
    assert outcome.code == 0 and not outcome.err
    says(outcome)
    content = json.loads(cli("generate", "--run", run, "--device", "cpu", "--dry_run", "--format", "json").out)
    first, *others = content["images"]
    assert (first["height"], first["width"], first["prompt"]) == (
        64,
        96,
        "an astronaut in an orange suit before a flag",
    )
    assert first["loras"] == [{"file": str(run / "style.safetensors"), "weight": 1.0}] and len(others) == 3
    assert first["path"] == "generated/mine/0001.png"


def test_missing_model_files(cli, says, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "none"))
    outcome = cli("generate", *QWEN, "--prompt", "a")
    assert outcome.code == 1 and "--rehearse" not in outcome.err
    says(outcome)
    assert outcome.err == names("4 model files are missing", MODEL_ID)
    assert outcome.err == names("diffsynth download qwen-image-lora", "DIFFSYNTH_MODEL_BASE_PATH")
