"""What the dry run tells on a machine that holds nothing yet: the plan, what it takes, and what is missing."""

import shlex
from pathlib import Path

import pytest

from diffsynth_cli.wrapping import wrap_line
from diffsynth_core.config.recipes import recipe_names

QWEN = "Qwen/Qwen-Image:"
NOT_HERE = (
    f"  dit             {QWEN}transformer/diffusion_pytorch_model*.safetensors (not here, 40.9 GB as published, "
    "20.4 billion parameters), LoRA of rank 32 on 717 modules"
)
PARTS = """\
    40.9 GB  weights of dit
   940.2 MB  LoRA
   940.2 MB  gradients
     1.9 GB  state of the optimizer (AdamW)
     2.4 GB  activations (recomputed block by block)
    47.0 GB  training in all
    16.6 GB  text_encoder while it encodes, before training: weights
     2.3 GB  vae while it encodes, before training: weights and its largest maps
    47.0 GB  at most at once
"""


@pytest.fixture
def plan(cli, tmp_path, monkeypatch):
    """The dry run of a recipe where there are neither models nor a dataset."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))

    def run(recipe: str, *arguments: object):
        outcome = cli("train", "--recipe", recipe, "--dry_run", *arguments)
        assert list(Path().iterdir()) == []
        return outcome

    return run


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_has_a_plan_without_files(plan, recipe):
    outcome = plan(recipe)
    assert outcome.code == 1
    assert outcome.out.count("training in all") == outcome.out.count("weights of dit") >= 1
    assert "unknown" not in outcome.out and "the size of" not in outcome.out
    assert "nothing matches" in outcome.err and "the dataset folder" in outcome.err


def test_the_plan_names_what_is_not_here_and_what_the_run_takes(plan):
    outcome = plan("qwen-image-lora")
    lines = outcome.out.splitlines()
    assert NOT_HERE in lines
    assert "No dataset: `data/example_image_dataset` is not there, so neither buckets nor steps are known" in lines
    assert PARTS in outcome.out
    assert outcome.err.splitlines()[-1] == "5 problems"


def test_with_a_dataset_its_largest_picture_counts(plan, dataset):
    outcome = plan("qwen-image-lora", "--dataset_base_path", dataset, "--batch_size", 2, "--max_pixels", 128 * 128)
    assert outcome.code == 1 and "the dataset folder" not in outcome.err
    (told,) = (line for line in outcome.out.splitlines() if line.startswith("Memory of the GPU"))
    assert told.startswith("Memory of the GPU, estimated for the largest micro-batch of the dataset: 2 of ")
    assert "encodings of 4 samples" in outcome.out


def test_wrong_use_is_told_with_what_is_missing_and_without_a_plan(plan):
    outcome = plan("qwen-image-lora", "--lora_rnk", 4)
    assert outcome.code == 2 and outcome.out == ""
    assert "did you mean `lora_rank`?" in outcome.err and "nothing matches" in outcome.err


@pytest.mark.parametrize("recipe", ["qwen-image-lora", "wan2.2-t2v-a14b-lora"])
def test_the_run_itself_tells_the_same_as_missing(cli, plan, recipe):
    planned, refused = plan(recipe), cli("train", "--recipe", recipe)
    assert (refused.code, refused.out, refused.err) == (1, "", planned.err)
    assert "error: there is no tokenizer at `" in refused.err


def fit(outcome) -> list[str]:
    """The verdict, which is the last thing that is told, and the flags below it."""
    lines = outcome.out.splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith(("Fits in", "Does not fit in")))
    return lines[start:]


def tried(outcome) -> list[str]:
    lines = outcome.out.splitlines()
    return lines[next(number for number, line in enumerate(lines) if line.startswith("Tried")) : lines.index("", 1)]


def test_a_gpu_that_is_large_enough(plan):
    assert fit(plan("qwen-image-lora", "--gpu_memory", "48GB")) == [
        "Fits in 48.0 GB: 47.0 GB are needed, 952.2 MB are left for what is not counted"
    ]


def test_the_smallest_change_that_fits_is_found(plan):
    outcome = plan("qwen-image-lora", "--gpu_memory", "45.5GiB", "--no_use_gradient_checkpointing")
    assert tried(outcome) == [
        "Tried to make it fit in 48.9 GB, that first which costs the least",
        "    47.0 GB  activations recomputed: fits",
    ]
    assert fit(outcome) == [
        "Does not fit in 48.9 GB: 94.5 GB are needed",
        "To make it fit, with 47.0 GB, give",
        "  --use_gradient_checkpointing",
    ]


def test_changes_are_put_together_where_none_is_enough(plan):
    outcome = plan("qwen-image-lora", "--gpu_memory", "24GB")
    changes, told = tried(outcome), fit(outcome)
    assert changes[1] == "    45.6 GB  activations recomputed, inputs of blocks in host memory"
    assert changes[-1].endswith(
        "activations recomputed, inputs of blocks in host memory and dit in 8-bit floats and rank 16: fits"
    )
    entry = f"{QWEN}transformer/diffusion_pytorch_model*.safetensors"
    assert told == [
        "Does not fit in 24.0 GB: 47.0 GB are needed",
        "To make it fit, with 23.2 GB, give",
        "  --use_gradient_checkpointing_offload \\",
        f"  --fp8_models '{entry}' \\",
        "  --lora_rank 16",
    ]
    flags = shlex.split(" ".join(line.removesuffix("\\") for line in told[2:]))
    assert fit(plan("qwen-image-lora", "--gpu_memory", "24GB", *flags))[0].startswith("Fits in 24.0 GB")


def test_it_is_said_when_nothing_makes_it_fit(plan):
    assert fit(plan("flux.2-klein-9b-full", "--gpu_memory", "24GB")) == [
        "Does not fit in 24.0 GB: 181.6 GB are needed; nothing that was tried makes it fit"
    ]


def test_each_stage_has_a_verdict_behind_all_plans(plan):
    outcome = plan("wan2.2-t2v-a14b-lora", "--gpu_memory", "24GB")
    verdicts = [line for line in outcome.out.splitlines() if "Does not fit" in line]
    assert [line.partition(":")[0] for line in verdicts] == ["Stage high", "Stage low"]
    given = [line for line in outcome.out.splitlines() if line.startswith("  --only")]
    assert given == ["  --only high \\", "  --only low \\"]
    assert outcome.out.index("Stage high: Does") > outcome.out.rindex("Tried to make it fit")


def test_what_is_planned_for_stands_apart_from_what_this_machine_has(plan):
    assert plan("qwen-image-lora").out.splitlines()[:2] == [
        "Qwen-Image on a GPU, precision bf16, seed 0",
        "  planned for a GPU; this machine has none and would train on cpu, precision no",
    ]
    outcome = plan("qwen-image-lora", "--device", "cpu")
    assert outcome.out.startswith("Qwen-Image on cpu, precision no, seed 0\n  dit")
    assert "Memory of the CPU, estimated for the largest the parameters allow: " in outcome.out


@pytest.mark.parametrize(
    ("flag", "value", "first", "told"),
    [
        ("--mixed_precision", "fp16", "on a GPU, precision fp16", "`mixed_precision` `fp16` needs a GPU"),
        ("--device", "cuda", "on cuda, precision bf16", "`device` `cuda` is not there; accelerators found: none"),
    ],
)
def test_what_only_a_gpu_does_can_be_planned_without_one(plan, flag, value, first, told):
    outcome = plan("qwen-image-lora", flag, value)
    assert outcome.code == 1 and told in outcome.err and "bf16`" not in outcome.err.partition(told)[0]
    assert outcome.out.startswith(f"Qwen-Image {first}, seed 0\n")
    assert "training in all" in outcome.out


OFFLOADED = "wan2.1-i2v-14b-720p-full"
CASTS = "    32.3 GB  weights as autocast casts them, at the end of a forward pass, when all activations wait in host memory"


def test_each_part_is_there_at_the_fullest_moment(plan):
    outcome = plan(OFFLOADED)
    lines = outcome.out.splitlines()
    assert "    19.3 GB  activations (recomputed block by block, inputs of blocks wait in host memory)" in lines
    assert "    65.6 GB  what AdamW works with in its step, when activations are gone" in lines
    assert "   327.9 GB  training in all, with the step of AdamW in place of activations" in lines
    assert "autocast" not in outcome.out


def test_no_part_is_of_nothing(plan):
    """With gradients of an earlier micro-batch a forward pass ends at the fullest, when all activations have left."""
    outcome = plan(OFFLOADED, "--gradient_accumulation_steps", 2)
    assert CASTS in outcome.out.splitlines()
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
    assert "  all parameters of the recipe: `diffsynth recipe show qwen-image-lora`" in plan("qwen-image-lora").out


@pytest.mark.parametrize("amount", ["24", "much", "-3GB"])
def test_an_amount_needs_a_unit(plan, amount):
    outcome = plan("qwen-image-lora", f"--gpu_memory={amount}")
    assert outcome.code == 2
    told = f"error: `gpu_memory` takes an amount of memory such as 24GB, got `{amount}` (`--gpu_memory`)"
    assert told in outcome.err.splitlines()


def test_a_rehearsal_has_tiny_weights(cli, tmp_path: Path):
    outcome = cli("train", "--recipe", "qwen-image-lora", "--rehearse", "--gpu_memory", "24GB")
    assert outcome.code == 2
    assert outcome.err.splitlines() == [
        "error: `gpu_memory` means nothing to a rehearsal, whose weights are tiny",
        "  hint: give it to `--dry_run` without `--rehearse`",
    ]


def test_the_plan_does_not_guess_at_tensors_it_has_no_shapes_of(plan):
    outcome = plan("qwen-image-lora", "--fp8_models", "Qwen/Qwen-Image:text_encoder/model*.safetensors")
    assert "8.3 billion parameters), weights kept in float8, how many is not known without its files" in outcome.out
    assert "the largest tensor while it is read (text_encoder, vae: not known without files)" in outcome.out
