"""Faulty videos, model files and parameters of Wan: reported before reading weights, with nothing written."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from safetensors.torch import load_file, save_file

from tests.naming import names
from tests.wan import CLIP, DIT, I2V, T2V, TEXT, TI2V, entries

SMALL = ("--height", 64, "--width", 96, "--num_frames", 9)


def write_video(path: Path, frames: int, *settings: str) -> None:
    """Write a moving test pattern of 128 x 96 pixels; `settings` are ffmpeg options after the input."""
    source = f"testsrc2=size=128x96:rate=24,trim=end_frame={frames}"
    command = [get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", *settings]
    subprocess.run([*command, "-y", str(path)], check=True)


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Three clips of 13 frames."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_video(folder / "a.mp4", 13, "-movflags", "+faststart")
    for name in ("b.mp4", "c.mp4"):
        shutil.copy(folder / "a.mp4", folder / name)
    (folder / "metadata.csv").write_text("video,prompt\na.mp4,one\nb.mp4,two\nc.mp4,three\n")
    return folder


@pytest.fixture
def models(tiny_models, tiny_wan, tmp_path, cli, monkeypatch) -> Path:
    """Wan's tiny models, and Qwen-Image's."""
    copy = Path(shutil.copytree(tiny_wan, tmp_path / "models"))
    shutil.copytree(tiny_models, copy, dirs_exist_ok=True)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(copy))
    return copy


def test_a_file_of_another_family(refuse):
    other = "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors"
    assert refuse(*entries(T2V, dit=other), *SMALL, recipe="wan2.1-t2v-1.3b-lora") == (
        2,
        [
            (
                names(other, "transformer of Qwen-Image", "not a component", "Wan"),
                names("dit", "text_encoder", "vae", "image_encoder"),
            )
        ],
    )


def test_the_text_encoder_in_place_of_the_transformer(refuse, models):
    shutil.copy(models / T2V / TEXT, models / T2V / "diffusion_pytorch_model.pth")
    wrong = f"{T2V}:diffusion_pytorch_model.pth"
    assert refuse(*entries(T2V, dit=wrong), *SMALL, recipe="wan2.1-t2v-1.3b-lora") == (
        2,
        [(names(wrong, "text_encoder of Wan", "not its dit"), names("put the dit"))],
    )


def test_an_image_to_video_recipe_without_its_image_encoder(refuse):
    assert refuse(*entries(I2V, image_encoder=None), *SMALL, recipe="wan2.1-i2v-14b-480p-lora") == (
        2,
        [
            (
                names("no image_encoder weights", "Wan (image to video)"),
                names("--model_paths", "--model_id_with_origin_paths"),
            )
        ],
    )


def test_a_pickled_file_that_is_neither_there_nor_copied(refuse, models):
    (models / T2V / "Wan2.1_VAE.pth").unlink()
    copy = "DiffSynth-Studio/Wan-Series-Converted-Safetensors:Wan2.1_VAE.safetensors"
    code, [(message, _)] = refuse(*SMALL, recipe="wan2.1-t2v-1.3b-lora")
    assert code == 1
    assert message == (names("model_id_with_origin_paths", "nothing", f"{T2V}:Wan2.1_VAE.pth", "mirror", copy, models))


def test_a_vae_of_the_other_generation(refuse, models):
    code, [(message, _)] = refuse(*entries(TI2V, vae=f"{T2V}:Wan2.1_VAE.pth"), *SMALL, recipe="wan2.2-ti2v-5b-lora")
    assert code == 2
    assert message == (names("vae", f"{T2V}:Wan2.1_VAE.pth", "16 channels", "dit of Wan 2.2 TI2V", 48))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("visual.transformer.0.attn.to_qkv.weight", lambda tensor: torch.cat((tensor, tensor[:1]))),
        ("visual.transformer.0.attn.to_qkv.weight", lambda tensor: tensor[0, 0].clone()),
        ("visual.cls_embedding", lambda tensor: tensor.repeat(1, 3, 1)),
    ],
)
def test_a_tensor_that_cannot_be_cut_into_those_of_the_module(refuse, models, name, wrong):
    path = models / I2V / CLIP
    tensors = torch.load(path, weights_only=True)
    expected, found = list(tensors[name].shape), wrong(tensors[name])
    torch.save(tensors | {name: found}, path)
    assert refuse(*SMALL, "--extra_inputs", "input_image", recipe="wan2.1-i2v-14b-480p-lora") == (
        1,
        [
            (
                names("image_encoder", f"{I2V}:{CLIP}", "1 tensor", name, list(found.shape), expected),
                names("config.json"),
            )
        ],
    )


@pytest.mark.parametrize("channels", [(48, 16), (52, 16)])
def test_a_kind_of_wan_that_is_not_trained(refuse, models, channels):
    """Control models have more input channels than supported variants: reported before encoding."""
    taken, made = channels
    for path in sorted((models / T2V).glob(DIT)):
        tensors = load_file(path)
        if "patch_embedding.weight" in tensors:
            tensors["patch_embedding.weight"] = torch.zeros(32, taken, 1, 2, 2, dtype=torch.bfloat16)
        save_file(tensors, path)
    config = models / T2V / "config.json"
    config.write_text(config.read_text().replace('"in_dim": 16', f'"in_dim": {taken}'))
    code, [(message, _)] = refuse(*SMALL, recipe="wan2.1-t2v-1.3b-lora")
    assert code == 1
    assert message == (names(f"{taken} input", f"{made} output", "Wan", "not supported"))


@pytest.mark.parametrize(
    ("recipe", "settings", "message", "hint"),
    [
        (
            "wan2.1-t2v-1.3b-lora",
            ("--height", 72, "--width", 96, "--num_frames", 9),
            names("height", 72, "not a multiple", 16, "Wan (text to video)"),
            names("--height 64"),
        ),
        (
            "wan2.2-ti2v-5b-lora",
            ("--height", 64, "--width", 112, "--num_frames", 9),
            names("width", 112, "not a multiple", 32, "Wan 2.2 TI2V"),
            names("--width 96"),
        ),
        (
            "wan2.1-t2v-1.3b-lora",
            ("--height", 64, "--width", 96, "--num_frames", 12),
            names("num_frames", 12, "4n + 1", "Wan (text to video)"),
            names("--num_frames 9", 13),
        ),
        (
            "wan2.1-t2v-1.3b-lora",
            (*SMALL, "--extra_inputs", "input_image"),
            names("extra_inputs", "input_image", "Wan (text to video)", "not support"),
            "remove it",
        ),
        (
            "wan2.1-i2v-14b-480p-lora",
            (*SMALL, "--extra_inputs", "end_image"),
            names("extra_inputs", "lacks", "input_image", "Wan (image to video)"),
            names("--extra_inputs end_image,input_image"),
        ),
        (
            "wan2.2-ti2v-5b-lora",
            (*SMALL, "--extra_inputs", "input_imag"),
            names("extra_inputs", "input_imag", "Wan 2.2 TI2V", "not support"),
            names("input_image"),
        ),
    ],
)
def test_settings_that_the_model_cannot_take(refuse, recipe, settings, message, hint):
    assert refuse(*settings, recipe=recipe) == (2, [(message, hint)])


def test_a_single_frame_that_the_model_is_given(refuse, dataset):
    write_video(dataset / "b.mp4", 3)
    code, [(message, hint)] = refuse(*SMALL, recipe="wan2.2-ti2v-5b-lora")
    assert code == 1
    assert message == (names("row 2", dataset / "b.mp4", "one frame", "Wan 2.2 TI2V"))
    assert hint == names("remove the row", '--extra_inputs ""')


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]), "truncated after"),
        (lambda path: path.write_text("no video"), "not a known video format"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
    ],
)
def test_a_video_that_cannot_be_read(refuse, dataset, spoil, reason):
    spoil(dataset / "b.mp4")
    code, [(message, hint)] = refuse(*SMALL[:4], "--num_frames", 13, recipe="wan2.1-t2v-1.3b-lora")
    assert code == 1
    assert message == names("row 2", dataset / "b.mp4", "cannot be read", reason)
    assert hint == names("replace the file")


def test_a_video_without_frames(refuse, dataset):
    write_video(dataset / "b.mkv", 13, "-frames:v", "0", "-c:v", "ffv1")
    (dataset / "metadata.csv").write_text("video,prompt\nb.mkv,a black film\n")
    code, [(message, _)] = refuse(*SMALL, recipe="wan2.1-t2v-1.3b-lora")
    assert code == 1
    assert message == names("row 1", dataset / "b.mkv", "cannot be read")


def test_a_file_of_another_kind(refuse, dataset):
    (dataset / "b.doc").write_text("a text")
    (dataset / "metadata.csv").write_text("video,prompt\nb.doc,a black film\n")
    code, [(message, hint)] = refuse(*SMALL, recipe="wan2.1-t2v-1.3b-lora")
    assert code == 1
    assert message == names(dataset / "b.doc", "neither")
    assert hint == names("convert it to MP4")


def test_a_cache_that_cannot_be_written(refuse, dataset):
    code, [(message, hint)] = refuse(*SMALL, "--cache_path", dataset / "a.mp4", recipe="wan2.1-t2v-1.3b-lora")
    assert code == 2
    assert (message, hint) == (names("cache_path", dataset / "a.mp4", "is a file"), "choose a folder")
