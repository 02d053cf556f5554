"""Real runs on tiny weights: what they save, and that they can be resumed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from tests.conftest import CAPTIONS, ENTRIES, MODEL_ID

RECIPE = ("--recipe", "qwen-image-lora", "--dataset_num_workers", 0, "--dataset_repeat", 2, "--num_epochs", 1)


def test_a_lora_run_writes_what_it_promises(cli, photographs):
    outcome = cli("train", *RECIPE, "--dataset_base_path", photographs, "--output_path", "out", "--save_steps", 5)
    assert outcome.code == 0, outcome.err
    record = json.loads(Path("out/run.json").read_text())
    assert record["status"] == "completed"
    assert [entry["file"] for entry in record["checkpoints"]] == ["step-5.safetensors", "step-8.safetensors"]
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == 8
    assert "transformer_blocks.0.attn.to_q.lora_A.default.weight" in load_file("out/step-8.safetensors")


def common(dataset: Path, *more: object) -> tuple[object, ...]:
    return ("train", *RECIPE, "--dataset_base_path", dataset, *more)


def test_a_second_run_loads_neither_text_encoder_nor_vae(cli, photographs):
    first = cli(*common(photographs, "--output_path", "first", "--seed", 1))
    assert first.code == 0
    second = cli(*common(photographs, "--output_path", "second", "--seed", 2, "--verbose"))
    assert second.code == 0
    assert "Loading dit" in second.err
    assert "Loading text_encoder" not in second.err and "Loading vae" not in second.err
    assert "4 of 4 encodings are in the cache; text_encoder is not loaded" in second.err
    assert "4 of 4 encodings are in the cache; vae is not loaded" in second.err


def test_encoders_are_not_even_built_when_all_is_cached(cli, photographs, monkeypatch):
    from diffsynth_core.training import encode

    assert cli(*common(photographs, "--output_path", "first")).code == 0
    monkeypatch.setattr(encode, "load_for_run", lambda *_: pytest.fail("an encoder was loaded"))
    assert cli(*common(photographs, "--output_path", "second")).code == 0


def test_a_replaced_image_alone_is_encoded_again(cli, dataset, tmp_path):
    cache = ("--cache_path", tmp_path / "own_cache")
    assert cli(*common(dataset, "--output_path", "first", *cache)).code == 0
    before = encodings_below(tmp_path / "own_cache")
    original = (dataset / "coffee.png").stat()
    with Image.open(dataset / "coffee.png") as image:
        ImageOps.mirror(image).save(dataset / "coffee.png")
    os.utime(dataset / "coffee.png", ns=(original.st_atime_ns, original.st_mtime_ns))
    second = cli(*common(dataset, "--output_path", "second", *cache))
    assert second.code == 0
    assert "Loading vae" in second.err and "Loading text_encoder" not in second.err
    after = encodings_below(tmp_path / "own_cache")
    assert len(before["text"]) == 4 and after["text"] == before["text"]
    assert len(after["latents"] - before["latents"]) == 1 and before["latents"] < after["latents"]


def test_a_changed_caption_alone_is_encoded_again(cli, dataset, tmp_path):
    cache = ("--cache_path", tmp_path / "own_cache")
    assert cli(*common(dataset, "--output_path", "first", *cache)).code == 0
    metadata = dataset / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("a cat", ""))
    assert cli(*common(dataset, "--output_path", "second", *cache)).code == 0
    after = encodings_below(tmp_path / "own_cache")
    assert (len(after["text"]), len(after["latents"])) == (5, 4)


def encodings_below(cache: Path) -> dict[str, set[str]]:
    folder = cache / "encodings" / "qwen-image"
    return {name: {path.name for path in (folder / name).rglob("*.safetensors")} for name in ("text", "latents")}


def test_a_crash_while_encoding_leaves_whole_entries_only(cli, photographs, tmp_path, monkeypatch):
    """The third image fails; entries encoded before are complete, and the next run encodes only the rest."""
    from diffsynth_core.planning.data import encoder_inputs

    cache = ("--cache_path", tmp_path / "own_cache")
    real = encoder_inputs.load_pixel_tensor
    calls = []

    def failing(crop):
        calls.append(crop.path)
        if len(calls) == 3:
            raise MemoryError("as the system would")
        return real(crop)

    monkeypatch.setattr(encoder_inputs, "load_pixel_tensor", failing)
    assert cli(*common(photographs, "--output_path", "first", *cache)).code == 1
    assert len(encodings_below(tmp_path / "own_cache")["latents"]) == 2
    assert not Path("first").exists()
    monkeypatch.setattr(encoder_inputs, "load_pixel_tensor", real)
    second = cli(*common(photographs, "--output_path", "second", *cache))
    assert second.code == 0, second.err
    assert "Encoding latents: 2 of 2 samples" in second.err


def test_accumulated_singles_train_as_a_batch(cli, photographs):
    """4 x 1 and 1 x 4: the same samples, the same noise, the same steps."""
    settings = ("--learning_rate", 0.001, "--max_steps", 4)
    assert cli(*common(photographs, "--output_path", "batch", "--batch_size", 4, *settings)).code == 0
    assert (
        cli(*common(photographs, "--output_path", "singles", "--gradient_accumulation_steps", 4, *settings)).code == 0
    )
    batch, singles = (load_file(f"{name}/epoch-0.safetensors") for name in ("batch", "singles"))
    assert max(float((batch[name] - singles[name]).abs().max()) for name in batch) < 1e-5


def test_a_short_last_batch_is_trained_and_weighs_by_its_samples(cli, photographs):
    assert cli(*common(photographs, "--output_path", "out", "--batch_size", 3)).code == 0
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [line["samples_seen"] for line in lines] == [3, 6, 8]


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(cli, photographs):
    outcome = cli(*common(photographs, "--output_path", "out", "--learning_rate", 1e30))
    assert outcome.code == 1
    assert "not finite in step" in outcome.err and "row " in outcome.err and "Traceback" not in outcome.err
    assert "no earlier state was saved" in outcome.err
    record = json.loads(Path("out/run.json").read_text())
    assert record["status"] == "failed" and record["step"] == 0
    assert record["diverged_step"] == len(Path("out/metrics.jsonl").read_text().splitlines()) + 1
    assert not Path("out/state").exists()


def test_text_encoder_in_full_beside_a_lora(cli, photographs):
    """One file: the LoRA without the removed prefix, all weights of the text encoder with theirs, both changed."""
    from diffsynth_core.weights.headers import read_headers

    settings = ("--trainable_models", "text_encoder", "--lora_rank", 4, "--learning_rate", 1e-3)
    outcome = cli(*common(photographs, "--output_path", "out", *settings))
    assert outcome.code == 0, outcome.err
    plan = cli(
        *common(photographs, "--output_path", "other", *settings, "--dry_run", "--verbose")
    ).out  # all hashes are known now
    assert "encoded in every step (the encoder is being trained)" in plan
    saved = load_file("out/epoch-0.safetensors")
    base = {}
    for path in sorted(
        (Path(os.environ["DIFFSYNTH_MODEL_BASE_PATH"]) / MODEL_ID / "text_encoder").glob("*.safetensors")
    ):
        base.update(load_file(path))
    full = {name for name in saved if name.startswith("pipe.text_encoder.")}
    lora = {name for name in saved if name.startswith("transformer_blocks.")}
    assert full | lora == set(saved)
    assert len(full) == len(base)
    headers = read_headers([Path("out/epoch-0.safetensors")])
    assert {headers[name].dtype for name in full} == {"BF16"}
    assert {saved[name].dtype for name in lora} == {torch.float32}
    layer = "layers.0.self_attn.q_proj.weight"
    assert not torch.equal(saved[f"pipe.text_encoder.model.language_model.{layer}"], base[f"model.{layer}"])
    assert all(saved[name].abs().max() > 0 for name in lora if "lora_B" in name)


def test_full_training_leaves_alone_what_no_gradient_reaches(cli, photographs):
    outcome = cli(
        "train",
        "--recipe",
        "qwen-image-full",
        "--dataset_repeat",
        1,
        "--num_epochs",
        1,
        "--dataset_base_path",
        photographs,
        "--output_path",
        "out",
    )
    assert outcome.code == 0, outcome.err
    saved = load_file("out/epoch-0.safetensors")
    base = {}
    for path in sorted(
        (Path(os.environ["DIFFSYNTH_MODEL_BASE_PATH"]) / MODEL_ID / "transformer").glob("*.safetensors")
    ):
        base.update(load_file(path))
    assert saved.keys() == base.keys()
    assert torch.equal(
        saved["transformer_blocks.1.txt_mlp.net.2.weight"], base["transformer_blocks.1.txt_mlp.net.2.weight"]
    )


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trained_weights_are_float32_whatever_the_precision(cli, photographs, precision):
    outcome = cli(*common(photographs, "--output_path", "out", "--mixed_precision", precision, "--max_steps", 2))
    assert outcome.code == 0, outcome.err
    [state] = Path("out/state").iterdir()
    assert {tensor.dtype for tensor in load_file(state / "trained.safetensors").values()} == {torch.float32}


def test_a_folder_of_images_with_captions_beside_them(cli, photographs, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, caption in CAPTIONS.items():
        shutil.copy(photographs / f"{name}.png", folder)
        (folder / f"{name}.txt").write_text(caption)
    assert cli(*common(folder, "--output_path", "out")).code == 0
    same_pairs = cli(*common(photographs, "--output_path", "other", "-v"))
    assert same_pairs.err.count("4 of 4 encodings are in the cache") == 2


def test_local_files_and_hub_entries_mixed(cli, photographs, tiny_models):
    """`model_paths` with a nested list of shards, and a hub entry in addition, with spaces around commas."""
    shards = [str(path) for path in sorted((tiny_models / MODEL_ID / "transformer").glob("*.safetensors"))]
    outcome = cli(
        "train", "--model_paths", json.dumps([shards, str(tiny_models / MODEL_ID / "vae/diffusion_pytorch_model.safetensors")]),
        "--model_id_with_origin_paths", f" {ENTRIES['text_encoder']} , ", "--lora_base_model", "dit", "--lora_target_modules", "to_q, to_k",
        "--dataset_base_path", photographs, "--output_path", "out", "--max_steps", 1,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert len(load_file("out/epoch-0.safetensors")) == 2 * 2 * 2


def test_a_lora_goes_on_from_a_file(cli, photographs):
    assert cli(*common(photographs, "--output_path", "first", "--learning_rate", 0.01)).code == 0
    outcome = cli(
        *common(
            photographs,
            "--output_path",
            "second",
            "--lora_checkpoint",
            "first/epoch-0.safetensors",
            "--learning_rate",
            0,
        )
    )
    assert outcome.code == 0, outcome.err
    first, second = load_file("first/epoch-0.safetensors"), load_file("second/epoch-0.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("recipe", "component"), [("qwen-image-lora", "text_encoder"), ("qwen-image-full", "vae")])
def test_every_trained_parameter_gets_a_gradient(cli, photographs, recipe, component):
    """Unused parameters are excluded in each component; one step gives every other parameter moments."""
    outcome = cli(
        "train", "--recipe", recipe, "--dataset_num_workers", 0, "--dataset_base_path", photographs,
        "--trainable_models", f"dit,{component}", "--no-find_unused_parameters", "--max_steps", 1, "--output_path", "out",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    [state] = Path("out/state").iterdir()
    trained, moments = load_file(state / "trained.safetensors"), load_file(state / "optimizer.safetensors")
    assert {name for name in trained if f"{name}/exp_avg" not in moments} == set()


def test_a_plan_can_be_handed_to_worker_processes_of_any_kind(photographs, tiny_models):
    """macOS and newer Pythons start workers by pickling what they need."""
    import pickle

    from diffsynth_core.config.resolve import resolve
    from diffsynth_core.planning.plan import make_plan
    from diffsynth_core.progress import SilentReporter

    resolved = resolve({"recipe": "qwen-image-lora", "dataset_base_path": str(photographs), "output_path": "unused"})
    plan = make_plan(resolved, SilentReporter(), base=tiny_models)
    assert pickle.loads(pickle.dumps(plan)).model.components == plan.model.components


def test_two_runs_in_one_folder_are_kept_apart(cli, photographs, tmp_path):
    from diffsynth_core.checkpoints.run_folder import claim_folder

    with claim_folder(tmp_path / "out"):
        second = cli(*common(photographs, "--output_path", tmp_path / "out"))
    assert second.code == 1 and f"`{tmp_path / 'out'}` is in use by another run" in second.err


def test_an_image_that_changes_while_it_is_encoded_stays_out_of_the_cache(cli, dataset, tmp_path, monkeypatch):
    from diffsynth_core.planning.data import encoder_inputs

    real = encoder_inputs.load_pixel_tensor

    def changing(crop):
        pixels = real(crop)
        crop.path.touch()
        return pixels

    monkeypatch.setattr(encoder_inputs, "load_pixel_tensor", changing)
    outcome = cli(*common(dataset, "--output_path", "out", "--cache_path", tmp_path / "own_cache"))
    assert outcome.code == 1 and "changed while it was encoded" in outcome.err
    assert encodings_below(tmp_path / "own_cache")["latents"] == set()


def test_captions_that_are_cut_are_told(cli, dataset, tmp_path):
    metadata = dataset / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("a cat", "cat " * 3000))
    outcome = cli(*common(dataset, "--output_path", "out", "--cache_path", tmp_path / "own_cache"))
    assert outcome.code == 0, outcome.err
    assert "warning: captions are truncated to 1024 tokens: 1 sample, the first is row 2" in outcome.err


def test_a_run_killed_before_its_record_was_whole_can_be_finished(cli, photographs):
    """As if killed right after its last state: resuming completes the record, with every checkpoint in it."""
    common_arguments = common(photographs, "--output_path", "out", "--save_steps", 4)
    assert cli(*common_arguments).code == 0
    record = json.loads(Path("out/run.json").read_text())
    record |= {"status": "running", "step": 4}
    Path("out/run.json").write_text(json.dumps(record))
    outcome = cli(*common_arguments, "--resume", "auto")
    assert outcome.code == 0, outcome.err
    record = json.loads(Path("out/run.json").read_text())
    assert (record["status"], record["step"]) == ("completed", 8)
    assert [entry["file"] for entry in record["checkpoints"]] == ["step-4.safetensors", "step-8.safetensors"]


def test_a_resumed_step_must_be_made_of_as_many_micro_batches(cli, photographs):
    arguments = common(photographs, "--output_path", "out", "--max_steps", 2)
    assert cli(*arguments).code == 0
    outcome = cli(
        *arguments,
        "--resume",
        "auto",
        "--max_steps",
        3,
        "--gradient_accumulation_steps",
        2,
        "--mixed_precision",
        "bf16",
    )
    assert outcome.code == 2
    assert "a step had 1 micro-batches (accumulation x processes) in the run in `out`, now 2" in outcome.err
    assert "the precision was no in the run in `out`, now it is bf16" in outcome.err
