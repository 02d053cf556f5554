"""Faulty weight files, tokenizers and output folders: reported before reading weights, with nothing written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.naming import names

PLACES = {
    "dit": "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors",
    "text_encoder": "Qwen/Qwen-Image:text_encoder/model*.safetensors",
    "vae": "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors",
}
FETCH = names("download the file")


def name_models(*entries: str) -> tuple[str, str]:
    return "--model_id_with_origin_paths", ",".join(entries)


@pytest.fixture
def repository(models) -> Path:
    return models / "Qwen/Qwen-Image"


@pytest.fixture
def vae(repository) -> Path:
    return repository / "vae/diffusion_pytorch_model.safetensors"


def split(path: Path) -> tuple[dict, bytes]:
    """Split a safetensors file into header and tensor bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_glob_that_matches_nothing(refuse, models):
    entry = "Qwen/Qwen-Image:nothing/*.safetensors"
    assert refuse(*name_models(PLACES["dit"], PLACES["text_encoder"], entry)) == (
        1,
        [
            (
                names("model_id_with_origin_paths", "nothing", entry, models),
                names(f"diffsynth download '{entry}'", "DIFFSYNTH_MODEL_BASE_PATH", "--rehearse"),
            )
        ],
    )


def test_a_local_file_that_is_not_there(refuse):
    message = names("model_paths", "nowhere.safetensors", "does not exist")
    assert refuse("--model_paths", '["nowhere.safetensors"]') == (1, [(message, "correct the path")])


def test_a_missing_shard_is_the_only_problem(refuse, repository):
    name = "diffusion_pytorch_model-00002-of-00002.safetensors"
    (repository / "transformer" / name).unlink()
    message = names(PLACES["dit"], "missing", "1 shard", name)
    assert refuse() == (1, [(message, names("diffsynth download qwen-image-lora"))])


def test_files_cut_short(refuse, vae):
    _, data = split(vae)
    vae.write_bytes(vae.read_bytes()[:-1000])
    there = len(data) - 1000
    message = names(vae, "truncated", f"{len(data)} bytes", there)
    assert refuse() == (1, [(message, FETCH)])


@pytest.mark.parametrize("size", [0, 7, 100])
def test_files_cut_short_in_the_header(refuse, vae, size):
    vae.write_bytes(vae.read_bytes()[:size])
    message = names(vae, f"{size} bytes", "safetensors", "header")
    assert refuse() == (1, [(message, FETCH)])


def test_a_file_with_more_than_its_header_names(refuse, vae):
    vae.write_bytes(vae.read_bytes() + b"more")
    assert refuse() == (1, [(names(vae, "4 bytes", "header"), FETCH)])


@pytest.mark.parametrize(
    ("key", "lie"),
    [
        ("shape", [33]),
        ("shape", [32.0]),
        ("shape", ["32"]),
        ("dtype", "F9"),
        ("data_offsets", [0.0, 64.0]),
        ("data_offsets", [0, 66]),
        ("data_offsets", [64, 0]),
        ("data_offsets", [0]),
    ],
)
def test_a_header_that_lies_about_a_tensor(refuse, vae, key, lie):
    """Rejected in advance instead of by the safetensors library later."""
    header, data = split(vae)
    name = next(name for name, entry in header.items() if name != "__metadata__" and entry["data_offsets"] == [0, 64])
    header[name][key] = lie
    join(vae, header, data)
    assert refuse() == (1, [(names(vae, "header", name, "inconsistent"), FETCH)])


def test_a_header_whose_metadata_are_no_texts(refuse, vae):
    header, data = split(vae)
    join(vae, {**header, "__metadata__": {"step": 3}}, data)
    code, [(message, hint)] = refuse()
    assert (code, hint) == (1, FETCH)
    assert message.startswith(f"`{vae}`")


def test_tensors_that_overlap(refuse, vae):
    header, data = split(vae)
    entries = sorted((entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__")
    (begin, end), first = entries[0]
    twin = next(name for (start, stop), name in entries[1:] if stop - start == end - begin)
    header[twin]["data_offsets"] = header[first]["data_offsets"]
    join(vae, header, data)
    assert refuse() == (1, [(names(vae, "header", "overlap"), FETCH)])


def test_shapes_that_contradict_config_json(refuse, repository):
    path = repository / "transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "joint_attention_dim": 48}))
    message = names("dit", PLACES["dit"], "2 tensors", path, "txt_in.weight", "[32, 64]", "[32, 48]")
    assert refuse() == (1, [(message, names("config.json"))])


@pytest.mark.parametrize(
    ("component", "change"),
    [
        ("transformer", {"attention_head_dim": "wide"}),
        ("vae", {"base_dim": "wide"}),
        ("text_encoder", {"text_config": 3}),
    ],
)
def test_a_config_json_that_builds_nothing(refuse, repository, component, change):
    path = repository / component / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    code, [(message, hint)] = refuse()
    assert code == 1 and hint
    assert f"`{path}`" in message and "internal error" not in message


@pytest.mark.parametrize(
    ("component", "change", "reason"),
    [
        ("transformer", {"axes_dims_rope": [16, 56, 56]}, "broadcast"),
        ("vae", {"latents_mean": [0.5] * 12}, "broadcast"),
        ("vae", {"latents_mean": [{}]}, "dict"),
        ("vae", {"latents_std": ["x"]}, "str"),
    ],
)
def test_a_config_json_that_fits_the_weights_and_computes_nothing(refuse, repository, component, change, reason):
    path = repository / component / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    code, [(message, hint)] = refuse("--dry_run")
    assert code == 1 and "download" in hint
    assert f"`{path}`" in message and reason in message and "internal error" not in message


def test_shapes_that_do_not_tell_the_configuration(refuse, repository):
    """Without config.json heads of 128 channels are assumed; those of the tiny text encoder are smaller."""
    (repository / "text_encoder/config.json").unlink()
    code, [(message, hint)] = refuse()
    assert code == 1 and hint
    assert f"`{PLACES['text_encoder']}`" in message and "config.json" in message + hint


def test_a_config_json_that_is_no_json(refuse, repository):
    path = repository / "vae/config.json"
    path.write_text("{")
    assert refuse() == (1, [(names(path, "not valid JSON", "line 1", "column 2"), FETCH)])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_res_blocks": 10**8}, names("num_res_blocks", 100000000, "at most")),
        ({"base_dim": 10**12}, names("base_dim", 1000000000000, "at most", 1048576)),
        ({"dim_mult": [1] * 10**4}, names("length of dim_mult", 10000, "at most")),
        ({"nested": {"max_position_embeddings": 2**40}}, names("nested.max_position_embeddings", 1099511627776)),
    ],
)
def test_a_config_json_with_numbers_that_no_model_has(refuse, repository, setting, message):
    path = repository / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    code, [(printed, hint)] = refuse()
    assert code == 1 and printed == names(path, message)
    assert hint == names("config.json")


def test_a_folder_in_the_place_of_a_config_json(refuse, repository):
    path = repository / "vae/config.json"
    path.unlink()
    path.mkdir()
    assert refuse() == (1, [(names(path, "a folder", "a file"), FETCH)])


def test_a_component_named_twice(refuse):
    again = "Qwen/Qwen-Image:vae/*.safetensors"
    message = names(again, PLACES["vae"], "vae", "Qwen-Image")
    assert refuse(*name_models(*PLACES.values(), again)) == (2, [(message, "pass only one of them")])


def test_a_component_left_out(refuse):
    message = names("no vae weights", "Qwen-Image")
    assert refuse(*name_models(PLACES["dit"], PLACES["text_encoder"])) == (
        2,
        [(message, names("--model_paths", "--model_id_with_origin_paths"))],
    )


def test_a_file_that_is_no_component(refuse, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"linear.weight": np.zeros((2, 2), np.float32)}, path)
    message = names(path, "not a component", "Qwen-Image", "linear.weight")
    hint = names("dit", "text_encoder", "vae", "controlnet")
    assert refuse("--model_paths", f'["{path}"]') == (2, [(message, hint)])


def test_no_tokenizer_beside_the_text_encoder(refuse, repository):
    shutil.rmtree(repository / "tokenizer")
    message = names("no tokenizer", f"{repository}/tokenizer")
    command = "diffsynth download 'Qwen/Qwen-Image:tokenizer/*'"
    assert refuse() == (1, [(message, names(command, "--tokenizer_path"))])


def test_a_tokenizer_folder_that_is_not_there(refuse):
    message = names("no tokenizer", "nowhere")
    assert refuse("--tokenizer_path", "nowhere") == (1, [(message, names("--tokenizer_path"))])


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_tokenizer_that_lacks_a_file(refuse, repository, name):
    (repository / "tokenizer" / name).unlink()
    code, [(message, hint)] = refuse()
    assert code == 1 and "`--tokenizer_path`" in hint
    assert message == names("cannot read", f"{repository}/tokenizer")


def test_a_damaged_tokenizer(refuse, repository):
    path = repository / "tokenizer/vocab.json"
    path.write_text("{")
    code, [(message, _)] = refuse()
    assert code == 1
    assert message == names("cannot read", path, "not valid JSON", "line 1", "column 2")
    path.unlink()
    path.mkdir()
    code, [(message, _)] = refuse()
    assert code == 1 and message == names("missing", "tokenizer.json", "vocab.json", "merges.txt")


def test_settings_of_a_tokenizer_of_a_wrong_type(refuse, repository):
    path = repository / "tokenizer/tokenizer_config.json"
    path.write_text("[]")
    code, [(message, _)] = refuse()
    assert code == 1
    assert message == names("cannot read", path, "a list", "an object")


def write_lora(path: Path, rank: int, module: str = "transformer_blocks.0.attn.to_q", width: int = 32) -> None:
    down, up = np.zeros((rank, width), np.float32), np.zeros((32, rank), np.float32)
    save_file({f"{module}.lora_A.default.weight": down, f"{module}.lora_B.default.weight": up}, path)


def test_a_lora_checkpoint_of_another_rank(refuse, tmp_path):
    path = tmp_path / "lora.safetensors"
    write_lora(path, rank=16)
    message = names(path, "rank 16", "lora_rank", 32)
    assert refuse("--lora_checkpoint", path) == (2, [(message, names("--lora_rank 16"))])


def test_a_lora_checkpoint_of_another_model(refuse, tmp_path):
    path = tmp_path / "lora.safetensors"
    write_lora(path, rank=32, module="double_blocks.0.img_attn.qkv")
    code, [(message, hint)] = refuse("--lora_checkpoint", path)
    assert (code, hint) == (1, names("pass a LoRA"))
    assert message == names(path, "2 of 2", "no module")


def test_a_lora_checkpoint_that_is_not_there(refuse):
    message = names("lora_checkpoint", "nowhere.safetensors", "does not exist")
    assert refuse("--lora_checkpoint", "nowhere.safetensors") == (1, [(message, "correct the path")])
