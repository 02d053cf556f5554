"""The dry run on a machine without files: the plan, its requirements, and what is missing."""

import re
import shlex
from pathlib import Path

import pytest

from diffsynth_cli.text.wrapping import wrap_line
from diffsynth_core.config.gpu_memory import MEMORY_WORDS
from diffsynth_core.config.recipes import recipe_names
from tests.documented_recipes import PRESETS
from tests.naming import names

QWEN = "Qwen/Qwen-Image:"
NOT_HERE = names(
    "dit",
    f"{QWEN}transformer/diffusion_pytorch_model*.safetensors",
    "missing",
    "40.9 GB",
    "20.4 billion",
    "LoRA of rank 32",
    "717 modules",
)
FREE_DISK = r"[\d.]+ [MGT]B free(: not enough)?"
CACHE = r"`[^`]*`(?=, [\d.]+ [MGT]B free)"
"""Parts that differ between machines."""


@pytest.fixture
def plan(cli, tmp_path, monkeypatch):
    """Run a dry run without models and dataset, where a run would download models."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    monkeypatch.delenv("DIFFSYNTH_SKIP_DOWNLOAD")

    def run(recipe: str, *arguments: object):
        outcome = cli("train", "--recipe", recipe, "--dry_run", *arguments)
        assert list(Path().iterdir()) == []
        return outcome

    return run


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.long] if name in PRESETS else []) for name in recipe_names()]
)
def test_every_recipe_has_a_plan_without_files(plan, recipe):
    outcome = plan(recipe, "--verbose")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("training in total") == outcome.out.count("weights of dit") >= 1
    assert "unknown without its files" not in outcome.out and "the size of" not in outcome.out
    stages = max(1, sum(line.startswith("Stage ") for line in outcome.out.splitlines()))
    missing = 0 if recipe.startswith("shapes-") else stages  # the model of these is shipped
    assert len(re.findall("^Missing +model files", outcome.out, re.MULTILINE)) == missing
    assert outcome.out == names("does not exist", "number of steps")


@pytest.mark.parametrize("recipe", ["qwen-image-lora", "wan2.2-t2v-a14b-lora", "qwen-image-full"])
def test_the_plan_is_short(plan, says, recipe):
    """The result first, then what is missing and what will be done, one line each, then the flags that make it fit."""
    outcome = plan(recipe, "--gpu_memory", "24GB")
    assert next(line for line in outcome.out.splitlines() if "Stage" not in line).startswith("Does not fit in 24.0 GiB")
    assert "57.7 GB to download" in outcome.out or "qwen" not in recipe
    stages = 2 if "a14b" in recipe else 1
    assert len(outcome.out.partition("`--verbose`")[0].splitlines()) <= 11 * stages
    says(outcome, FREE_DISK)


def test_all_of_the_plan_is_told_if_asked_for(plan, says):
    outcome = plan("qwen-image-lora", "-v", "--gpu_memory", "24GB")
    assert outcome.out == NOT_HERE
    says(outcome, CACHE, FREE_DISK)


def test_the_download_is_counted_on_the_disk(plan, monkeypatch):
    monkeypatch.setattr("diffsynth_cli.text.summary.free_bytes", lambda folder: 60 * 10**9)
    (line,) = (line for line in plan("qwen-image-lora").out.splitlines() if line.startswith("Disk"))
    assert line.startswith("Disk      67.1 GB (download 57.7 GB, ") and line.endswith("; 60.0 GB free: not enough")


def test_a_dataset_that_is_named_and_missing_is_a_fault(plan, says):
    outcome = plan("qwen-image-lora", "--dataset_base_path", "nowhere", "--gpu_memory", "24GB")
    assert outcome.code == 1 and outcome.err == names("nowhere", "dataset_base_path", "does not exist")
    assert outcome.out.startswith("Does not fit")


def test_model_files_are_a_fault_where_nothing_is_downloaded(plan, monkeypatch, says):
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "1")
    outcome = plan("qwen-image-lora")
    assert outcome.code == 1
    says(outcome.err)


@pytest.mark.parametrize(
    ("memory", "code", "verdict"),
    [
        ("24GB", 3, names("Does not fit", "24.0 GiB", "43.8 GiB")),
        ("24GiB", 3, names("Does not fit", "24.0 GiB")),
        ("24576 MiB", 3, names("Does not fit", "24.0 GiB")),
        ("RTX 4090", 3, names("Does not fit", "24.0 GiB")),
        ("A100-40", 3, names("Does not fit", "40.0 GiB")),
        ("44GB", 0, names("Tight", "44.0 GiB", "43.8 GiB", "187.7 MiB left")),
        ("L40S", 0, names("Fits", "45.0 GiB", "43.8 GiB", "1.2 GiB left")),
        ("h100", 0, names("Fits", "79.6 GiB")),
    ],
)
def test_whether_it_fits_is_told_first_and_by_the_exit_code(says, plan, memory, code, verdict):
    outcome = plan("qwen-image-lora", "--gpu_memory", memory)
    assert (outcome.code, outcome.err) == (code, "")
    first = outcome.out.splitlines()[0]
    says(first)
    assert first == verdict


def test_with_a_dataset_its_largest_image_counts(plan, dataset):
    given = ("--dataset_base_path", dataset, "--batch_size", 2, "--max_pixels", 128 * 128)
    outcome = plan("qwen-image-lora", *given, "--verbose")
    assert outcome.code == 0 and "error" not in outcome.err
    (reported,) = (line for line in outcome.out.splitlines() if line.startswith("GPU memory"))
    assert reported == names("largest micro-batch", "2 of")
    assert "encodings of 4 samples" in outcome.out


def test_how_long_a_run_may_take_is_told_with_what_a_save_takes(plan, dataset):
    outcome = plan("qwen-image-lora", "--dataset_base_path", dataset, "--max_time", "3h50m")
    (reported,) = (line for line in outcome.out.splitlines() if line.startswith("Time"))
    # LoRA weights and moments of AdamW in float32, and a checkpoint of the weights: 4 x 4 bytes for each of them.
    assert reported == names("3h50m", "encoding included", "a save of 3.8 GB", "39 s", "until one is measured")


@pytest.mark.parametrize(
    ("amount", "meant"), [("230", "`230s` or `230m` or `230h`"), ("3:50:00", "`3h50m`"), ("0s", None), ("soon", None)]
)
def test_what_is_no_duration_is_told_with_what_may_be_meant(cli, amount, meant):
    outcome = cli("train", "--recipe", "qwen-image-lora", "--max_time", amount)
    assert outcome.code == 2
    assert outcome.err == names("error:", "max_time", "a duration such as 3h50m", amount, "--max_time")
    assert ("did you mean" in outcome.err) == (f"did you mean {meant}?" in outcome.err) == bool(meant)


def test_a_rehearsal_has_no_time_to_keep(cli):
    outcome = cli("train", "--recipe", "qwen-image-lora", "--rehearse", "--max_time", "1h", "--gpu_memory", "24GB")
    assert outcome.code == 2 and "2 problems" in outcome.err
    assert outcome.err == names("`max_time` has no effect in a rehearsal")


def test_wrong_use_is_told_with_what_is_missing_and_without_a_plan(says, plan):
    outcome = plan("qwen-image-lora", "--lora_rnk", 4)
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err == names("hint:", "lora_rank") and outcome.err == names("4 model files", "missing")
    says(outcome)


@pytest.mark.parametrize("recipe", ["qwen-image-lora", "wan2.2-t2v-a14b-lora"])
def test_the_run_itself_tells_model_files_in_one_line(cli, plan, monkeypatch, recipe):
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "1")
    planned, refused = plan(recipe), cli("train", "--recipe", recipe)
    assert (refused.code, refused.out) == (1, "")
    assert all(line in refused.err for line in planned.err.splitlines())
    assert refused.err.count("model files are missing: ") == 1
    assert refused.err == names(f"diffsynth download {recipe}")


def verdict(outcome) -> str:
    return outcome.out.splitlines()[0]


def changes(outcome) -> list[str]:
    """Return the flags that make a run fit, from the last line."""
    lines = outcome.out.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("To make it fit")]
    return lines[starts[0] :] if starts else []


def tried(outcome) -> list[str]:
    lines = outcome.out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("Options"))
    return lines[start : lines.index("", start)]


def test_the_smallest_change_that_fits_is_found(says, plan):
    outcome = plan("qwen-image-lora", "--gpu_memory", "45.5GiB", "--no_use_gradient_checkpointing", "--verbose")
    assert tried(outcome) == [
        names("45.5 GiB", "cheapest first"),
        "   43.8 GiB  recomputed activations: fits",
    ]
    assert verdict(outcome) == names("Does not fit", "45.5 GiB", "88.0 GiB")
    assert changes(outcome) == [names("peak of 43.8 GiB"), "  --use_gradient_checkpointing"]
    says("\n".join([verdict(outcome), *tried(outcome), *changes(outcome)]))


def test_changes_are_put_together_where_none_is_enough(says, plan):
    outcome = plan("qwen-image-lora", "--gpu_memory", "23GB", "--verbose")
    listed, reported = tried(outcome), changes(outcome)
    says("\n".join([*listed, *reported]))
    assert listed[1] == names("block inputs in host memory")
    assert listed[-1].endswith(": fits")
    assert not any("lora_rank" in line or "max_pixels" in line for line in reported)
    flags = shlex.split(" ".join(line.removesuffix("\\") for line in reported[1:]))
    assert verdict(plan("qwen-image-lora", "--gpu_memory", "23GB", *flags)).startswith("Fits in 23.0 GiB")


def test_it_is_said_when_a_change_leaves_little(says, plan):
    reported = changes(plan("shapes-lora", "--gpu_memory", "50MB"))
    assert reported[0] == names("peak of", "tight", "MiB left")
    says("\n".join(reported))


def test_it_is_said_when_nothing_makes_it_fit(says, plan):
    outcome = plan("flux.2-klein-9b-full", "--gpu_memory", "1GB")
    assert outcome.code == 3 and changes(outcome) == []
    assert verdict(outcome) == names("Does not fit", "1.0 GiB", "139.2 GiB", "none of")
    says(verdict(outcome))


def test_full_training_with_zero_2_and_offload_fits_eight_gpus(plan):
    """The documented launch, as it stands: DeepSpeed holds bf16 weights on the GPU, and no float32 ones."""
    several = ("--num_processes", "8", "--gpu_memory", "80GB", "--accelerate_config")
    outcome = plan("qwen-image-full", *several, "zero2offload")
    assert outcome.code == 0 and verdict(outcome) == names("Fits", "42.3 GiB")
    assert outcome.out == names("kept in bf16", "updated in float32")
    outcome = plan("qwen-image-full", *several, "zero2offload", "--trained_dtype", "float32")
    assert outcome.code == 3 and verdict(outcome) == names("Does not fit", "117.4 GiB")
    assert "  --trained_dtype bf16" in changes(outcome)
    assert "kept in bf16" not in outcome.out


def test_each_stage_has_a_verdict_and_its_flags_stand_behind_all_plans(plan):
    outcome = plan("wan2.2-t2v-a14b-lora", "--gpu_memory", "24GB")
    verdicts = [line for line in outcome.out.splitlines() if "Does not fit" in line]
    assert len(verdicts) == 2
    given = [line for line in outcome.out.splitlines() if line.startswith("  --only")]
    assert given == ["  --only high \\", "  --only low \\"]
    assert outcome.out.index("  --only high") > outcome.out.index("Stage low\nDoes")


def test_what_is_planned_for_stands_apart_from_what_this_machine_has(plan):
    assert plan("qwen-image-lora").out.splitlines()[0] == names("Model", "Qwen-Image", "GPU in bf16", "cpu in float32")
    outcome = plan("qwen-image-lora", "--device", "cpu", "--verbose")
    assert outcome.out.startswith("Model     Qwen-Image on cpu in float32\n")
    assert outcome.out == names("CPU memory", "largest", "parameters allow")


@pytest.mark.parametrize(
    ("flag", "value", "first", "reported"),
    [
        ("--mixed_precision", "fp16", "on a GPU in fp16", names("mixed_precision", "fp16", "needs a GPU")),
        ("--device", "cuda", "on cuda in bf16", names("device", "cuda", "not available", "none")),
    ],
)
def test_what_only_a_gpu_does_can_be_planned_without_one(says, plan, flag, value, first, reported):
    outcome = plan("qwen-image-lora", flag, value)
    (line,) = (line for line in outcome.err.splitlines() if line == reported)
    says(line)
    assert outcome.code == 1 and "bf16`" not in outcome.err.partition(line)[0]
    assert outcome.out.startswith(f"Model     Qwen-Image {first}")
    assert "GiB peak on the GPU" in outcome.out


OFFLOADED = "wan2.1-i2v-14b-720p-full"
CASTS = names("30.1 GiB", "autocast copies", "forward pass", "host memory")


def test_each_part_is_there_at_the_fullest_moment(says, plan):
    outcome = plan(OFFLOADED, "-v", "--optimizer_args", "fused=false")
    lines = outcome.out.splitlines()
    assert outcome.out == names("18.4 GiB", "activations", "host memory")
    assert outcome.out == names("61.1 GiB", "AdamW", "activations are freed")
    assert outcome.out == names("305.4 GiB", "in total", "AdamW")
    says("\n".join(line for line in lines if "GiB" in line))
    assert "autocast" not in outcome.out


def test_no_part_is_of_nothing(plan):
    """With gradients of an earlier micro-batch, memory peaks at the end of the forward pass, without activations."""
    outcome = plan(OFFLOADED, "--gradient_accumulation_steps", 2, "-v")
    assert outcome.out == CASTS
    assert "  0 B" not in outcome.out and "recomputed block by block" not in outcome.out


def test_lines_are_set_in_where_the_terminal_ends():
    assert wrap_line("    16.6 GB  text_encoder while it encodes, before", 36) == (
        "    16.6 GB  text_encoder while it\n             encodes, before"
    )
    assert wrap_line("  vae             Qwen/Qwen-Image:vae/model.safetensors (not here)", 40) == (
        "  vae\n      Qwen/Qwen-Image:vae/model.safetensors\n      (not here)"
    )
    assert wrap_line("of any width, for programs", None) == "of any width, for programs"


def test_all_parameters_are_shown_elsewhere(plan):
    assert plan("qwen-image-lora", "-v").out == names("diffsynth recipe show qwen-image-lora")


@pytest.mark.parametrize(
    ("amount", "near"),
    [
        ("24", "24GB"),
        ("much", None),
        ("-3GB", None),
        ("A100", "A100-40` or `A100-80"),
        ("409O", "4090"),
        ("24TB", None),
    ],
)
def test_memory_needs_a_unit_or_a_known_card(says, plan, amount, near):
    outcome = plan("qwen-image-lora", f"--gpu_memory={amount}")
    assert outcome.code == 2
    says(outcome)
    assert outcome.err == names("error:", "gpu_memory", MEMORY_WORDS, amount, "--gpu_memory")
    assert (outcome.err == names(f"did you mean `{near}`?")) == bool(near)


def test_a_rehearsal_has_tiny_weights(cli, tmp_path: Path):
    outcome = cli("train", "--recipe", "qwen-image-lora", "--rehearse", "--gpu_memory", "24GB")
    assert outcome.code == 2
    assert outcome.err.splitlines() == [
        names("error:", "gpu_memory", "no effect", "rehearsal"),
        names("hint:", "--dry_run", "without", "--rehearse"),
    ]


def test_shapes_of_published_components_are_known_before_their_files(plan):
    outcome = plan("qwen-image-lora", "--fp8_models", "Qwen/Qwen-Image:text_encoder/model*.safetensors", "-v")
    assert outcome.out == names("8.3 billion", "86%", "float8")
    assert outcome.out == names("2.0 GiB", "largest tensor")
    assert "without files" not in outcome.out


def test_adamw_is_fused_on_gpus_but_not_in_fp16(plan):
    refused = plan("qwen-image-lora", "--mixed_precision", "fp16", "--optimizer_args", "fused=true")
    assert refused.code == 2 and "`fused=true` hides which steps were skipped" in refused.err
    fp16, bf16 = (plan("qwen-image-lora", "--verbose", "--mixed_precision", each) for each in ("fp16", "bf16"))
    assert ("fused kernel" in fp16.out, "fused kernel" in bf16.out) == (False, True)
    assert "  TF32 in float32 operations of CUDA devices: convolutions\n" in bf16.out
