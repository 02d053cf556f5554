"""A family registered from outside trains, saves, resumes, rehearses and estimates as the built-in ones do."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffsynth_core.config.resolve import resolve
from diffsynth_core.data.captions import draw_choice
from diffsynth_core.models.registry import FAMILIES, load_family
from diffsynth_core.planning.data.encodings import plan_encodings
from diffsynth_core.planning.data.encodings_plan import EncodingRef
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training import loop
from diffsynth_core.training.precompute import precompute
from tests.clips import detailed, write_clip
from tests.naming import names
from tests.toy_family import CHANNELS, ENTRIES, FACTOR, MODEL_ID, PLACES, TEXT_STATES, TEXT_WIDTH, TOY, Toy

CLIPS = {"a": 9, "b": 9, "c": 12}
SIZE = 32
CONTROLLED = ("--extra_inputs", "control_video,control_mask", "--data_file_keys", "video,control_video,control_mask")
LORA = ("--lora_base_model", "dit", "--lora_target_modules", "up,down", "--lora_rank", 2)


@pytest.fixture(autouse=True)
def _registered(monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def base(tmp_path) -> Path:
    for component, place in zip(("dit", "text_encoder", "vae"), PLACES.values(), strict=True):
        load_family("toy").write_tiny_weights(tmp_path / "models", component, MODEL_ID, place)
    return tmp_path / "models"


@pytest.fixture
def dataset(tmp_path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [("video", "control_video", "control_mask", "prompt", "speed", "direction")]
    for number, (name, frames) in enumerate(CLIPS.items()):
        write_clip(folder / f"{name}.mkv", detailed(frames, SIZE, SIZE))
        write_clip(folder / f"{name}_lines.mkv", 255 - detailed(frames, SIZE, SIZE))
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[:, : FACTOR * (number + 1)] = 255
        Image.fromarray(mask).save(folder / f"{name}_mask.png")
        rows.append((f"{name}.mkv", f"{name}_lines.mkv", f"{name}_mask.png", f"clip {name}", str(0.5 * number), "Left"))
    with (folder / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return folder


@pytest.fixture
def toy(cli, base, dataset, monkeypatch, tmp_path):
    """Run `diffsynth train` on the toy."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(base))
    monkeypatch.chdir(tmp_path)
    common = (
        "train", "--model_id_with_origin_paths", ",".join(ENTRIES), "--dataset_base_path", dataset,
        "--height", SIZE, "--width", SIZE, "--num_frames", 9, "--dataset_num_workers", 0,
        "--learning_rate", 0.01, "--save_steps", 1, "--dataset_repeat", 4,
    )  # fmt: skip
    return lambda *arguments: cli(*common, *arguments)


def planned(base, dataset, output, **more):
    values = {
        "model_id_with_origin_paths": ENTRIES, "dataset_base_path": dataset, "output_path": output,
        "height": SIZE, "width": SIZE, "num_frames": 9, "dataset_num_workers": 0, "learning_rate": 0.01,
        "lora_base_model": "dit", "lora_target_modules": "up,down", "lora_rank": 2, **more,
    }  # fmt: skip
    return make_plan(resolve(values), SilentReporter(), base=base)


@pytest.mark.parametrize("what", [LORA, ("--trainable_models", "dit"), ("--trainable_models", "dit,text_encoder,vae")])
def test_it_trains_saves_and_resumes_to_the_bit(toy, what):
    assert toy(*what, "--max_steps", 4, "--output_path", "through").code == 0
    assert toy(*what, "--max_steps", 2, "--output_path", "pieces").code == 0
    outcome = toy(*what, "--max_steps", 4, "--output_path", "pieces", "--resume", "auto")
    assert outcome.code == 0, outcome.err
    through, pieces, first = (
        load_file(path)
        for path in ("through/step-4.safetensors", "pieces/step-4.safetensors", "through/step-1.safetensors")
    )
    assert through.keys() == pieces.keys() and all(torch.equal(through[name], pieces[name]) for name in through)
    assert any(not torch.equal(through[name], first[name]) for name in through)


def test_gradient_checkpointing_and_float8_leave_the_losses_alone(toy):
    losses = {}
    for name, more in {
        "plain": (),
        "recomputed": ("--use_gradient_checkpointing",),
        "float8": ("--fp8_models", ENTRIES[0]),
    }.items():
        outcome = toy(*LORA, *more, "--max_steps", 2, "--output_path", name)
        assert outcome.code == 0, outcome.err
        losses[name] = [json.loads(line)["loss"] for line in Path(name, "metrics.jsonl").read_text().splitlines()]
    assert losses["recomputed"] == losses["plain"] != losses["float8"]
    assert losses["float8"] == pytest.approx(losses["plain"], rel=0.05)


def test_it_estimates_and_rehearses(toy, cli):
    outcome = toy(*LORA, "--dry_run")
    assert outcome.code == 0 and outcome.out == names("Toy"), outcome.err
    estimate = toy(*LORA, "--dry_run", "--gpu_memory", "24GB")
    assert estimate.code == 0, estimate.err
    rehearsed = cli("train", "--model_id_with_origin_paths", ",".join(ENTRIES), *LORA, "--rehearse")
    assert rehearsed.code == 0, rehearsed.err


def test_a_video_and_a_mask_at_once_reach_the_model(toy, monkeypatch):
    batches = []
    predict = Toy.predict_velocity
    monkeypatch.setattr(Toy, "predict_velocity", lambda *given: (batches.append(given[-1]), predict(*given))[1])
    outcome = toy(*LORA, *CONTROLLED, "--max_steps", 3, "--output_path", "out")
    assert outcome.code == 0, outcome.err
    side = SIZE // FACTOR
    _, *batches = batches  # the first is that of the trial
    assert [batch["control"].shape for batch in batches] == [(1, CHANNELS, 9, side, side)] * 3
    assert all(not torch.equal(batch["control"], batch["latents"]) for batch in batches)
    columns = sorted(int(batch["mask"].sum()) // side for batch in batches)
    assert columns == [1, 2, 3], "each clip has its own mask, in [0, 1]"


def test_a_control_video_that_is_too_short_is_an_error(toy, dataset):
    write_clip(dataset / "b_lines.mkv", detailed(5, SIZE, SIZE))
    outcome = toy(*LORA, *CONTROLLED, "--max_steps", 1, "--output_path", "out")
    assert outcome.code == 1
    assert outcome.err == names("row 2", "control_video", dataset / "b_lines.mkv", "5 frames", "9")


def with_two_captions(plan):
    """The plan with a second caption for the first two of its samples."""
    captions = [("clip a", "a first clip"), ("clip b", "a second clip"), ("clip c",)]
    samples = tuple(
        replace(sample, caption=first, other_captions=tuple(others))
        for sample, (first, *others) in zip(plan.data.samples.samples, captions, strict=True)
    )
    return replace(plan, data=replace(plan.data, samples=replace(plan.data.samples, samples=samples)))


@pytest.fixture
def drawn(monkeypatch):
    """Train; return which encoding of a caption each step was given."""
    states = []
    predict = Toy.predict_velocity
    monkeypatch.setattr(
        Toy, "predict_velocity", lambda *given: (states.append(given[-1]["prompt_embeds"]), predict(*given))[1]
    )

    def train(plan):
        states.clear()
        loop.train(plan, SilentReporter(), StopRequest())
        text, *_ = plan_encodings(plan, SilentReporter()).encoders
        encoded = {ref: text.cache.read(key)["prompt_embeds"] for ref, key in text.keys.items()}
        _, *of_steps = states  # the first is that of the trial
        return [next(ref for ref, one in encoded.items() if torch.equal(one[None], state)) for state in of_steps]

    return train


TWICE = {EncodingRef(0), EncodingRef(0, 1), EncodingRef(1), EncodingRef(1, 1), EncodingRef(2)}


def test_two_captions_of_a_sample_are_encoded_and_drawn(base, dataset, tmp_path, drawn):
    plain = planned(base, dataset, tmp_path / "out", max_steps=12, num_epochs=4)
    plan = with_two_captions(plain)
    before, after = (plan_encodings(one, SilentReporter()) for one in (plain, plan))
    for one, other in zip(before.encoders, after.encoders, strict=True):
        assert one.keys.items() <= other.keys.items(), "the keys of the first choice stay as they were"
    text, latents = after.encoders
    assert set(text.keys) == TWICE and len(set(text.keys.values())) == 5
    assert set(latents.keys) == {EncodingRef(0), EncodingRef(1), EncodingRef(2)}

    found = drawn(plan)
    assert set(found) == TWICE, "every choice is drawn"
    again = replace(plan, parameters=plan.parameters.model_copy(update={"output_path": tmp_path / "again"}))
    assert drawn(again) == found, "pure in seed, epoch and sample"


def test_two_captions_pass_through_a_folder_of_encoded_samples(base, dataset, tmp_path, drawn):
    steps = {"max_steps": 12, "num_epochs": 4}
    expected = drawn(with_two_captions(planned(base, dataset, tmp_path / "direct", **steps)))
    encode = planned(base, dataset, tmp_path / "encoded", task="sft:data_process", **steps)
    precompute(with_two_captions(encode), SilentReporter(), StopRequest())
    plan = planned(base, tmp_path / "encoded", tmp_path / "trained", task="sft:train", **steps)
    assert [len(sample.captions) for sample in plan.data.samples.samples] == [2, 2, 1]
    assert drawn(plan) == expected


DROPPED = {"max_steps": 24, "num_epochs": 8, "caption_dropout": 0.5}


def dropped_draws(plan):
    """Whether each step, of one sample, is trained with the empty caption."""
    slices = [plan.data.steps.slice(step) for step in range(plan.data.steps.total_steps)]
    refs = [(part.epoch, plan.data.steps.batches.batch(part.epoch, part.start)[0]) for part in slices]
    seed, dropout = plan.parameters.seed, plan.parameters.caption_dropout
    return [draw_choice(1, dropout, seed, epoch, ref.sample, ref.repeat) == 1 for epoch, ref in refs]


@pytest.fixture
def trained_without(monkeypatch):
    """Train; return whether each step was given the empty caption, whose letters are all the same."""
    states = []
    predict = Toy.predict_velocity
    monkeypatch.setattr(
        Toy, "predict_velocity", lambda *given: (states.append(given[-1]["prompt_embeds"].detach()), predict(*given))[1]
    )

    def train(plan):
        states.clear()
        loop.train(plan, SilentReporter(), StopRequest())
        _, *of_steps = states  # the first is that of the trial
        return [bool((state == state[:, :1]).all()) for state in of_steps]

    return train


@pytest.mark.parametrize("trains", [{}, {"trainable_models": "text_encoder"}], ids=["cached", "online"])
def test_a_share_of_the_draws_is_trained_with_the_empty_caption(base, dataset, tmp_path, trained_without, trains):
    plan = planned(base, dataset, tmp_path / "out", **DROPPED, **trains)
    expected = dropped_draws(plan)
    assert 6 < sum(expected) < 18
    assert trained_without(plan) == expected
    plain = planned(base, dataset, tmp_path / "plain", **DROPPED | {"caption_dropout": 0}, **trains)
    assert trained_without(plain) == [False] * 24
    assert plan.data.fingerprint == plain.data.fingerprint


def test_the_empty_caption_is_encoded_once(base, dataset, tmp_path):
    plan = planned(base, dataset, tmp_path / "out", **DROPPED)
    text, latents = plan_encodings(plan, SilentReporter()).encoders
    empty = [EncodingRef(sample, 1) for sample in range(3)]
    assert set(text.keys) == {EncodingRef(0), EncodingRef(1), EncodingRef(2), *empty}
    assert len({text.keys[ref] for ref in empty}) == 1
    assert text.missing == (EncodingRef(0), EncodingRef(0, 1), EncodingRef(1), EncodingRef(2))
    assert latents.missing == (EncodingRef(0), EncodingRef(1), EncodingRef(2))
    kept, plain = (
        find_workload(each).encoded for each in (plan, planned(base, dataset, tmp_path / "plain", max_steps=1))
    )
    assert (kept.wide, kept.narrow - plain.narrow) == (plain.wide, TEXT_STATES * TEXT_WIDTH)


def test_dropped_captions_resume_to_the_bit_with_other_workers(toy):
    flags = (*LORA, "--caption_dropout", 0.5)
    assert toy(*flags, "--max_steps", 8, "--output_path", "through").code == 0
    assert toy(*flags, "--max_steps", 3, "--output_path", "pieces").code == 0
    resume = ("--output_path", "pieces", "--resume", "auto", "--max_steps", 8)
    refused = toy(*LORA, "--caption_dropout", 0.4, *resume)
    assert refused.code == 2
    assert refused.err == names("caption_dropout", "0.5", "pieces", "0.4")
    outcome = toy(*flags, *resume, "--dataset_num_workers", 2)
    assert outcome.code == 0, outcome.err
    through, pieces = (load_file(f"{folder}/step-8.safetensors") for folder in ("through", "pieces"))
    assert all(torch.equal(through[name], pieces[name]) for name in through)
    assert toy(*LORA, "--max_steps", 8, "--output_path", "plain").code == 0
    plain = load_file("plain/step-8.safetensors")
    assert any(not torch.equal(through[name], plain[name]) for name in through)


def test_dropped_captions_pass_through_a_folder_of_encoded_samples(toy):
    weights = ",".join(ENTRIES)
    encode = ("--model_id_with_origin_paths", weights, "--task", "sft:data_process", "--output_path", "encoded")
    train = (*LORA, "--task", "sft:train", "--dataset_base_path", "encoded", "--max_steps", 8)
    dropped = ("--caption_dropout", 0.5)
    assert toy(*encode).code == 0
    refused = toy(*train, *dropped, "--output_path", "second")
    assert refused.code == 2
    assert refused.err == names("caption_dropout", "encoded", "empty caption")
    assert "sft:data_process" in refused.err
    outcome = toy(*encode, *dropped)
    assert outcome.code == 0, outcome.err
    assert "Encoding text: 1 of 1 samples" in outcome.err and "Encoding latents" not in outcome.err
    assert len(list(Path("encoded/encodings/text").rglob("*.safetensors"))) == 4
    refused = toy(*encode)
    assert refused.code == 2
    assert refused.err == names("encoded", "caption_dropout")
    outcome = toy(*train, *dropped, "--output_path", "second")
    assert outcome.code == 0, outcome.err
    assert toy(*LORA, *dropped, "--max_steps", 8, "--output_path", "whole").code == 0
    assert toy(*train, "--output_path", "undropped").code == 0
    assert toy(*LORA, "--max_steps", 8, "--output_path", "plain").code == 0
    for one, other in (("whole", "second"), ("plain", "undropped")):
        expected, found = (load_file(f"{folder}/step-8.safetensors") for folder in (one, other))
        assert all(torch.equal(expected[name], found[name]) for name in expected), other


def test_a_number_and_a_text_reach_the_model(toy, base, monkeypatch):
    batches = []
    predict = Toy.predict_velocity
    monkeypatch.setattr(Toy, "predict_velocity", lambda *given: (batches.append(given[-1]), predict(*given))[1])
    moved = (*LORA, "--extra_inputs", "speed,direction", "--max_steps", 3)
    outcome = toy(*moved, "--output_path", "out")
    assert outcome.code == 0, outcome.err
    letters = load_file(base / MODEL_ID / PLACES["text_encoder"])["letters.weight"]
    left = letters[list(b"Left".ljust(16))]
    _, *of_steps = batches  # the first is that of the trial
    found = sorted(float((batch["motion"][0] / left).mean()) for batch in of_steps)
    assert found == pytest.approx([0, 0.5, 1])
    assert all("control" not in batch for batch in batches)


@pytest.mark.parametrize(
    ("cell", "told"), [("", ("speed", "is empty")), ("fast", ("speed", "fast", "expected a number"))], ids=repr
)
def test_a_number_that_is_none_is_an_error(toy, dataset, cell, told):
    text = (dataset / "metadata.csv").read_text()
    (dataset / "metadata.csv").write_text(text.replace(",0.5,", f",{cell},"))
    outcome = toy(*LORA, "--extra_inputs", "speed,direction", "--max_steps", 1, "--output_path", "out")
    assert outcome.code == 1
    assert outcome.err == names("row 2", *told)


def test_its_conditions_are_checked_before_a_run(toy, cli, dataset):
    arguments = (
        "dataset", "validate", dataset, "--model_id_with_origin_paths", ",".join(ENTRIES), *CONTROLLED[:3],
        "video,control_video,control_mask", "--height", SIZE, "--width", SIZE, "--num_frames", 9, "--format", "json",
    )  # fmt: skip
    fine = cli(*arguments, "--workers", 1)
    assert fine.code == 0, [one for one in json.loads(fine.out)["findings"] if one["level"] == "error"]
    assert {finding["code"] for finding in json.loads(fine.out)["findings"] if finding["level"] == "error"} == set()
    (dataset / "b_lines.mkv").write_bytes(b"nothing")
    (dataset / "c_mask.png").unlink()
    broken = cli(*arguments, "--workers", 1)
    found = {(one["code"], one["path"]) for one in json.loads(broken.out)["findings"] if one["level"] == "error"}
    assert broken.code == 1 and {path for _, path in found} == {"b_lines.mkv", "c_mask.png"}, found
