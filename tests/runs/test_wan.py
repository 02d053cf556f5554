"""Real runs of Wan on tiny weights and real clips: what they save, and that they can be resumed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffsynth_core.models.wan import keys
from tests.clips import detailed, write_clip
from tests.covering import long_ones
from tests.wan import EXPERTS, I2V, PLACES, T2V, TI2V, entries

SMALL = ("--height", 64, "--width", 96, "--num_frames", 9, "--dataset_num_workers", 0, "--dataset_repeat", 2)
LORA = ("--lora_base_model", "dit", "--lora_target_modules", "q,k,v,o,ffn.0,ffn.2", "--lora_rank", 4)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Three clips of a moving photograph, one of them shorter than requested, and a still image."""
    import skimage.data
    from PIL import Image

    folder = tmp_path_factory.mktemp("clips")
    for name, frames in (("a.mp4", 24), ("b.mov", 9), ("c.mkv", 7)):
        write_clip(folder / name, detailed(frames, 64, 96))
    Image.fromarray(skimage.data.coffee()).resize((96, 64)).save(folder / "d.png")
    rows = ["video,prompt", "a.mp4,an astronaut", "b.mov,a woman &amp; a flag", "c.mkv,short", "d.png,a cup"]
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def train(cli, clips, tiny_wan, monkeypatch):
    """Run `diffsynth train` on the clips, with Wan's tiny models as the model base path."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_wan))

    def run(*arguments: object, code: int = 0):
        outcome = cli("train", "--dataset_base_path", clips, *SMALL, *arguments)
        assert outcome.code == code, outcome.err
        return outcome

    return run


def metrics_of(folder: str) -> list[dict]:
    timing = ("seconds", "data_seconds")
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in timing} for line in lines]


def same_tensors(left: str, right: str) -> bool:
    one, other = load_file(left), load_file(right)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_lora_has_the_documented_keys(train):
    outcome = train(*entries(T2V), *LORA, "--output_path", "out")
    assert "2 of 96 x 64 x 9 frames, 1 of 96 x 64 x 5 frames, 1 of 96 x 64" in outcome.err
    assert "1 of which is cut to 4n + 1: row 3 from 7 to 5" in outcome.err
    tensors = load_file("out/epoch-0.safetensors")
    modules = [f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in "qkvo"] + ["ffn.0", "ffn.2"]
    assert tensors.keys() == {
        f"blocks.{block}.{module}.lora_{half}.default.weight" for block in (0, 1) for module in modules for half in "AB"
    }
    assert len(metrics_of("out")) == 8


def test_a_full_checkpoint_is_the_base_file_trained(train, tiny_wan):
    train(*entries(T2V), "--trainable_models", "dit", "--learning_rate", 1e-3, "--output_path", "out")
    trained = load_file("out/epoch-0.safetensors")
    base = {}
    for path in (tiny_wan / T2V).glob(PLACES[T2V]["dit"]):
        base |= load_file(path)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in trained.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in base.items()
    }
    changed = {name for name in base if not torch.equal(base[name], trained[name])}
    assert len(changed) > len(base) / 2


@pytest.mark.parametrize(
    ("component", "table", "model"),
    [
        ("text_encoder", keys.TEXT_ENCODER, entries(T2V)),
        ("vae", keys.VAE_2_1, entries(T2V)),
        ("image_encoder", keys.IMAGE_ENCODER, (*entries(I2V), "--extra_inputs", "input_image")),
    ],
)
def test_the_other_components_train_and_are_written_by_their_own_names(train, component, table, model):
    train(*model, "--trainable_models", component, "--max_steps", 2, "--learning_rate", 1e-3, "--output_path", "out")
    written = load_file("out/epoch-0.safetensors")
    assert all(name.startswith(f"pipe.{component}.") for name in written)
    assert all(table.to_targets(name.removeprefix(f"pipe.{component}.")) for name in written)


def test_a_second_run_loads_no_encoder(train):
    common = (*entries(I2V), *LORA, "--extra_inputs", "input_image")
    train(*common, "--output_path", "first")
    second = train(*common, "--seed", 1, "--output_path", "second")
    assert "Loading dit" in second.err
    assert not any(f"Loading {name}" in second.err for name in ("text_encoder", "vae", "image_encoder"))


@pytest.mark.parametrize(
    "change",
    [
        ("--num_frames", 5),
        pytest.param(("--frame_rate", 12), marks=pytest.mark.long),
        pytest.param(("--clip_start", "middle"), marks=pytest.mark.long),
        pytest.param(("--width", 80), marks=pytest.mark.long),
        pytest.param(("--extra_inputs", "input_image,end_image"), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_another_part_of_the_clips_is_encoded_anew(train, tmp_path, change):
    """Anything that changes pixels or encodings must not be taken from the cache; captions are."""
    common = (*entries(I2V), *LORA, "--extra_inputs", "input_image", "--max_steps", 8, "--cache_path", tmp_path / "own")
    train(*common, "--output_path", "first")
    second = train(*common, *change, "--output_path", "second")
    assert "Loading vae" in second.err and "Loading text_encoder" not in second.err


@pytest.mark.parametrize(
    ("model_id", "extra"),
    [
        pytest.param(T2V, ("--clip_start", "random", "--batch_size", 2), marks=pytest.mark.long),
        (I2V, ("--extra_inputs", "input_image", "--dataset_num_workers", 2)),
        pytest.param(T2V, ("--trainable_models", "dit", "--use_gradient_checkpointing"), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_weights_and_metrics(train, model_id, extra):
    lora = () if "--trainable_models" in extra else LORA
    common = (*entries(model_id), *lora, *extra, "--learning_rate", 0.01, "--save_steps", 2)
    train(*common, "--output_path", "through")
    for stop in (("--max_steps", 1), ("--max_steps", 3), ()):
        train(*common, "--output_path", "pieces", "--resume", "auto", *stop)
    last = sorted(Path("through").glob("step-*.safetensors"))[-1].name
    assert same_tensors(f"through/{last}", f"pieces/{last}")
    assert metrics_of("through") == metrics_of("pieces")


def test_recomputing_activations_changes_nothing(train):
    common = (*entries(I2V), *LORA, "--extra_inputs", "input_image", "--learning_rate", 0.01, "--max_steps", 4)
    train(*common, "--no-use_gradient_checkpointing", "--output_path", "plain")
    for flag in ("--use_gradient_checkpointing", "--use_gradient_checkpointing_offload"):
        train(*common, flag, "--output_path", flag.strip("-"))
        for one, other in zip(metrics_of("plain"), metrics_of(flag.strip("-")), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_giving_the_first_frame_changes_the_loss(train, tmp_path):
    """TI2V: the same clips and noise with and without `input_image` give different losses, all finite."""
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clip(clips / "a.mp4", detailed(9, 64, 96))
    (clips / "metadata.csv").write_text("video,prompt\na.mp4,an astronaut\n")
    common = (*entries(TI2V), *LORA, "--dataset_base_path", clips, "--max_steps", 2)
    train(*common, "--output_path", "text")
    train(*common, "--extra_inputs", "input_image", "--output_path", "image")
    losses = [[line["loss"] for line in metrics_of(folder)] for folder in ("text", "image")]
    assert losses[0] != losses[1] and all(0 < loss < 10 for pair in losses for loss in pair)


def expert_line(expert: str, low: float, high: float) -> tuple[object, ...]:
    """Return a documented command line for one expert of Wan 2.2 T2V-A14B, with sizes for a CPU."""
    other = {"high": "low-noise dit", "low": "dit"}[expert]
    return (
        *entries(EXPERTS, **{other: None}), "--learning_rate", 1e-4, "--num_epochs", 5,
        "--remove_prefix_in_ckpt", "pipe.dit.", *LORA,
        "--max_timestep_boundary", high, "--min_timestep_boundary", low,
    )  # fmt: skip


def test_the_documented_lines_of_both_experts_run_as_they_are(train, monkeypatch):
    """Without a recipe, each in its range of the timestep table, with the results of the recipe's stages.

    The trial before the steps draws once as well.
    """
    from diffsynth_core.training.timesteps import TIMESTEPS

    drawn: list[int] = []
    real = TIMESTEPS["uniform"]
    monkeypatch.setitem(TIMESTEPS, "uniform", lambda *draw: drawn.append(real(*draw)) or drawn[-1])
    train(*expert_line("high", 0, 0.417), "--output_path", "high", "--max_steps", 20)
    assert len(drawn) == 21 and all(0 <= timestep < 417 for timestep in drawn)
    drawn.clear()
    train(*expert_line("low", 0.417, 1), "--output_path", "low", "--max_steps", 20)
    assert len(drawn) == 21 and all(417 <= timestep < 1000 for timestep in drawn)
    train("--recipe", "wan2.2-t2v-a14b-lora", "--lora_rank", 4, "--output_path", "both", "--max_steps", 20)
    for stage in ("high", "low"):
        one, other = (sorted(Path(folder).glob("epoch-*.safetensors"))[-1] for folder in (stage, f"both/{stage}"))
        assert same_tensors(str(one), str(other))


@pytest.mark.parametrize("task", long_ones(("lora", "full"), long=("full",)))
def test_only_one_expert_is_in_memory(train, monkeypatch, task):
    """While a stage trains, no transformer of another stage is alive."""
    import gc

    from diffusers import WanTransformer3DModel

    from diffsynth_core.training.engines.replicated import ReplicatedEngine

    alive = []
    real = ReplicatedEngine.gradient_norm

    def counting(self):
        gc.collect()
        alive.append(sum(type(thing) is WanTransformer3DModel for thing in gc.get_objects()))
        return real(self)

    before = sum(type(thing) is WanTransformer3DModel for thing in gc.get_objects())
    monkeypatch.setattr(ReplicatedEngine, "gradient_norm", counting)
    train("--recipe", f"wan2.2-t2v-a14b-{task}", "--output_path", "both", "--max_steps", 2)
    assert set(alive) == {before + 1} and len(alive) == 4


def test_a_single_frame_that_is_shown_whole_is_told(train):
    outcome = train(*entries(I2V), *LORA, "--extra_inputs", "input_image", "--dry_run")
    assert (
        "1 sample with a single frame: the model is conditioned on all of it (input_image) and learns to copy it"
        in outcome.out
    )
