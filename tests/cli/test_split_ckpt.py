"""`diffsynth split-ckpt`: its output, and exact messages of rejections."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_core.progress import format_bytes
from tests.cli.conftest import read_problems, stamps
from tests.naming import names

LORA = "transformer_blocks.0.attn.to_q.lora_{}.default.weight"
RUN = {"family": "qwen-image", "removed_prefix": "pipe.dit.", "lora_component": "dit", "lora_format": "diffsynth"}


def ones(*shape):
    return torch.ones(*shape)


@pytest.fixture
def checkpoint(cli):
    """A checkpoint of a run in the working folder."""
    save_file(
        {
            "pipe.vae.conv_in.weight": ones(3, 2).bfloat16(),
            "pipe.vae.conv_in.bias": ones(3).bfloat16(),
            LORA.format("A"): ones(2, 4),
            LORA.format("B"): ones(4, 2),
        },
        "epoch-0.safetensors",
        RUN,
    )
    return Path("epoch-0.safetensors")


@pytest.fixture
def refuse(cli, says):
    """Run a command that must be rejected without writing anything; return exit code and problems."""

    def run(*arguments):
        before = stamps(Path())
        outcome = cli("split-ckpt", *arguments)
        assert outcome.code in (1, 2) and outcome.out == "" and stamps(Path()) == before, outcome.err
        says(f"exit code {outcome.code}\n{outcome.err}")
        return outcome.code, read_problems(outcome.err)

    return run


def test_what_is_written_is_told(cli, checkpoint):
    outcome = cli("split-ckpt", checkpoint, "--output-path", "parts")
    assert outcome.code == 0
    lora, vae = (Path("parts", f"{name}.safetensors").stat().st_size for name in ("dit.lora", "vae"))
    assert outcome.out == (
        f"parts/dit.lora.safetensors  2 tensors  {lora} B\nparts/vae.safetensors       2 tensors  {vae} B\n"
    )
    assert outcome.err.endswith(f"2 files, {format_bytes(lora + vae)} written\n")
    assert load_file("parts/vae.safetensors").keys() == {"conv_in.weight", "conv_in.bias"}
    assert load_file("parts/dit.lora.safetensors").keys() == {LORA.format("A"), LORA.format("B")}


def test_a_dry_run_writes_nothing(cli, checkpoint):
    outcome = cli("split-ckpt", checkpoint, "--output_path", "parts", "--dry-run", "--max-shard-size", "15")
    assert outcome.code == 0 and [path.name for path in Path().iterdir()] == [checkpoint.name]
    written = cli("split-ckpt", checkpoint, "--output_path", "parts", "--max-shard-size", "15")
    assert written.out == outcome.out
    sizes = {path.name: path.stat().st_size for path in Path("parts").iterdir()}
    kinds = {
        "dit.lora-00001-of-00002.safetensors": "1 tensor",
        "dit.lora-00002-of-00002.safetensors": "1 tensor",
        "dit.lora.safetensors.index.json": "index",
        "vae-00001-of-00002.safetensors": "1 tensor",
        "vae-00002-of-00002.safetensors": "1 tensor",
        "vae.safetensors.index.json": "index",
    }
    reported = [f"parts/{name} {kind} {sizes[name]} B" for name, kind in kinds.items()]
    assert [" ".join(line.split()) for line in outcome.out.splitlines()] == reported
    total = format_bytes(sum(sizes.values()))
    assert outcome.err == names("6 files", total, "dry run")


def test_programs_get_json(cli, checkpoint):
    content = json.loads(cli("split-ckpt", checkpoint, "--output_path", "parts", "--format", "json").out)
    assert (content["written"], content["inputs"], content["notes"]) == (True, ["epoch-0.safetensors"], [])
    assert [(file["path"], file["kind"], file["tensors"], file["bytes"]) for file in content["outputs"]] == [
        (path, "weights", 2, Path(path).stat().st_size)
        for path in ("parts/dit.lora.safetensors", "parts/vae.safetensors")
    ]
    assert content["outputs"][0]["metadata"]["lora_format"] == "diffsynth"
    taken = json.loads(content["outputs"][1]["metadata"]["taken_from"])
    assert taken == {"file": "epoch-0", "metadata": RUN, "prefix": "pipe.vae."}


def test_no_torch_is_imported(checkpoint):
    import subprocess
    import sys

    script = "import sys; from diffsynth_cli.main import main; code = main(sys.argv[1:]); "
    script += "sys.exit(code or bool({'torch', 'diffusers', 'numpy'} & sys.modules.keys()))"
    for words in (["epoch-0.safetensors", "--output_path", "parts"], ["parts", "--output_path", "whole", "--join"]):
        assert subprocess.run([sys.executable, "-c", script, "split-ckpt", *words]).returncode == 0


UNKNOWN = {"pipe.vae.x.weight": ones(1), **{f"nobody.{number}.weight": ones(1) for number in range(7)}}


def test_keys_without_a_component(refuse, cli):
    save_file(UNKNOWN, "x.safetensors")
    assert refuse("x.safetensors", "--output_path", "parts") == (
        1,
        [
            (
                names(
                    "x.safetensors",
                    "7 of 8 keys",
                    "nobody.0.weight",
                    "nobody.1.weight",
                    "nobody.2.weight",
                    "nobody.3.weight",
                    "nobody.4.weight",
                    "2 more",
                ),
                names("--unprefixed", "--allow_unmatched"),
            )
        ],
    )
    outcome = cli("split-ckpt", "x.safetensors", "--output_path", "parts", "--allow_unmatched")
    assert outcome.code == 0 and outcome.out == names("parts/vae.safetensors", "1 tensor")
    assert outcome.err == names("skipped", "7 tensors", "nobody.0.weight")
    assert cli("split-ckpt", "x.safetensors", "--output_path", "all", "--unprefixed", "dit").code == 0
    assert len(load_file("all/dit.safetensors")) == 7


def test_keys_that_fit_several_components(refuse):
    save_file({LORA.format("A"): ones(1, 1)}, "x.safetensors")
    code, [(message, _)] = refuse("x.safetensors", "--output_path", "parts")
    assert (code, message.partition("; ")[2]) == (1, names("dit", "controlnet"))


def test_nothing_matched_is_an_error_whatever_is_allowed(refuse):
    save_file({"nobody": ones(1)}, "x.safetensors")
    assert refuse("x.safetensors", "--output_path", "parts", "--allow_unmatched")[0] == 1


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def overlap(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b"[32,64]", b"[31,63]"))


def twice(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b"conv_in.bias", b"conv_in.weight"[:12]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_short, names("epoch-0.safetensors", "truncated", "header", "82 bytes", 81)),
        (overlap, names("epoch-0.safetensors", "header", "overlap")),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F16"')),
            names("epoch-0.safetensors", "header", LORA.format("A"), "inconsistent"),
        ),
        (
            lambda path: path.write_bytes(b"not at all"),
            names("epoch-0.safetensors", "10 bytes", "safetensors", "header"),
        ),
    ],
)
def test_damaged_files(refuse, checkpoint, change, message):
    change(checkpoint)
    assert refuse(checkpoint, "--output_path", "parts") == (1, [(message, names("download the file"))])


def test_a_key_that_stands_there_twice(refuse):
    save_file({"pipe.vae.x.weight": ones(1), "vae.x.weight": ones(1)}, "x.safetensors")
    assert refuse("x.safetensors", "--output_path", "parts") == (
        1,
        [(names("1 duplicate", "pipe.vae.x.weight", "vae.x.weight"), names("pass a file"))],
    )


def test_a_pickle(refuse):
    torch.save({"x": ones(1)}, "x.pth")
    assert refuse("x.pth", "--output_path", "parts") == (
        1,
        [(names("x.pth", "pickled", "safetensors"), names("convert it"))],
    )


def test_a_missing_shard(refuse, cli, checkpoint):
    assert cli("split-ckpt", checkpoint, "--output_path", "shards", "--by", "size", "--max_shard_size", "40").code == 0
    Path("shards/epoch-0-00002-of-00003.safetensors").unlink()
    for way in ((), ("--by", "size"), ("--join",)):
        assert refuse("shards", "--output_path", "parts", *way) == (
            1,
            [(names("1 shard", "missing", "shards", "epoch-0-00002-of-00003.safetensors"), names("download them"))],
        )


def test_a_shard_that_is_there_and_not_named(refuse, cli, checkpoint):
    assert cli("split-ckpt", checkpoint, "--output_path", "shards", "--by", "size", "--max_shard_size", "40").code == 0
    first, second, third = (f"epoch-0-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
    message = names("2 shards", "shards", "not listed", second, third)
    expected = (1, [(message, names("list all"))])
    assert refuse(f"shards/{first}", "--output_path", "parts") == expected


def test_names_for_what_is_not_there(refuse):
    save_file({LORA.format("A"): ones(2, 4), LORA.format("B"): ones(4, 2)}, "lora.safetensors", RUN)
    message = names("--layout", "full weights", "lora.safetensors")
    expected = (2, [(message, names("--lora_format"))])
    assert refuse("lora.safetensors", "--output_path", "parts", "--layout", "diffusers") == expected
    save_file({"pipe.vae.conv_in.weight": ones(3, 2)}, "full.safetensors", {"family": "qwen-image"})
    message = names("--lora_format", "LoRAs", "full.safetensors")
    expected = (2, [(message, names("--layout"))])
    assert refuse("full.safetensors", "--output_path", "parts", "--lora_format", "kohya") == expected


def test_files_that_do_not_belong_together(refuse, cli, checkpoint):
    save_file({"pipe.vae.a": ones(1)}, "a.safetensors")
    save_file({"pipe.vae.b": ones(1)}, "b.safetensors")
    for name in ("a", "b"):
        assert cli("split-ckpt", f"{name}.safetensors", "--output_path", name).code == 0
    assert refuse("a", "b", "--output_path", "whole", "--join") == (
        1,
        [(names("a/vae.safetensors", "b/vae.safetensors", "different checkpoints"), names("one checkpoint"))],
    )


def test_names_that_a_layout_does_not_have(refuse, cli):
    save_file({"pipe.dit.blocks.0.self_attn.q.weight": ones(2, 2), "pipe.dit.nobody": ones(1)}, "x.safetensors")
    assert refuse("x.safetensors", "--output_path", "parts", "--layout", "diffusers") == (
        1,
        [(names("--layout diffusers", "dit", "unknown family"), names("--family"))],
    )
    command = ("x.safetensors", "--output_path", "parts", "--layout", "original", "--family", "wan")
    message = names("1 tensor", "dit", "without", "original", "nobody")
    assert refuse(*command) == (1, [(message, names("remove `--layout`"))])
    outcome = cli("split-ckpt", *command, "--allow_unmatched")
    assert outcome.code == 0
    assert load_file("parts/dit.safetensors").keys() == {"blocks.0.self_attn.q.weight"}


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (
            ("--join", "--layout", "diffusers", "--max_shard_size", "5GB"),
            [
                (names("--max_shard_size", "cannot be used", "--join"), names("remove `--max_shard_size`")),
                (names("--layout", "cannot be used", "--join"), names("remove `--layout`")),
            ],
        ),
        (
            ("--by", "size", "--unprefixed", "dit"),
            [(names("--unprefixed", "cannot be used", "--by size"), names("remove `--unprefixed`"))],
        ),
        (("--max_shard_size", "big"), [(names("big", "not a size", "--max_shard_size"), names("5GB"))]),
        (("--family", "flx"), [(names("unknown family", "flx"), names("flux"))]),
        (("--unprefixed", "unet"), None),
    ],
)
def test_wrong_use(refuse, checkpoint, words, problems):
    code, found = refuse(checkpoint, "--output_path", "parts", *words)
    assert code == 2
    assert found == problems or problems is None


def test_what_the_checkpoint_says_counts(refuse, checkpoint):
    assert refuse(checkpoint, "--output_path", "parts", "--family", "wan") == (
        1,
        [(names("epoch-0.safetensors", "qwen-image", "--family", "wan"), names("remove `--family`"))],
    )
    assert refuse(checkpoint, "--output_path", "parts", "--unprefixed", "vae") == (
        1,
        [(names("dit", "--unprefixed", "vae"), names("remove `--unprefixed`"))],
    )


def test_what_is_there_is_kept_unless_asked(refuse, cli, checkpoint):
    Path("parts").mkdir()
    Path("parts/vae.safetensors").write_text("mine")
    hint = names("--output_path", "--overwrite")
    assert refuse(checkpoint, "--output_path", "parts") == (
        1,
        [(names("parts/vae.safetensors", "already exists"), hint)],
    )
    assert cli("split-ckpt", checkpoint, "--output_path", "parts", "--overwrite").code == 0
    assert len(load_file("parts/vae.safetensors")) == 2
