"""LoRAs merged into weight files: what changes, what stays byte-identical, messages, and rejected inputs."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from diffsynth_core.conversion import merging
from diffsynth_core.conversion.bases import open_base
from diffsynth_core.conversion.merge_plan import plan_merge
from diffsynth_core.conversion.merging import MergeResult, merge
from diffsynth_core.conversion.provenance import MERGED, InputHashes
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.progress import SilentReporter
from diffsynth_core.weights.weighted_files import WeightedFile, parse_lora
from tests.naming import names

WIDTH = 4
Q, K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
QWEN = {
    "transformer_blocks.0.img_mod.1.weight": (6 * WIDTH, WIDTH),
    f"{Q}.weight": (WIDTH, WIDTH), f"{Q}.bias": (WIDTH,), f"{K}.weight": (WIDTH, WIDTH),
    "txt_norm.weight": (WIDTH,), "img_in.weight": (WIDTH, 2), "proj_out.weight": (2, WIDTH),
}  # fmt: skip
FLUX = {
    "double_blocks.0.img_attn.qkv.weight": (3 * WIDTH, WIDTH), "double_blocks.0.img_mod.lin.weight": (6 * WIDTH, WIDTH),
    "single_blocks.0.modulation.lin.weight": (3 * WIDTH, WIDTH), "vector_in.in_layer.weight": (WIDTH, 2),
    "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
}  # fmt: skip
FLUX_DIFFUSERS = {
    **{f"transformer_blocks.0.attn.to_{part}.weight": (WIDTH, WIDTH) for part in "qkv"},
    "transformer_blocks.0.norm1.linear.weight": (6 * WIDTH, WIDTH),
    "transformer_blocks.0.norm1_context.linear.weight": (6 * WIDTH, WIDTH),
    "single_transformer_blocks.0.norm.linear.weight": (3 * WIDTH, WIDTH),
    "time_text_embed.text_embedder.linear_1.weight": (WIDTH, 2), "context_embedder.weight": (WIDTH, 2),
    "proj_out.weight": (2, WIDTH), "norm_out.linear.weight": (2 * WIDTH, WIDTH),
}  # fmt: skip


def random(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name, shape in shapes.items()}


def halves(module: str, rank: int = 2, rows: int = WIDTH, columns: int = WIDTH, seed: int = 1) -> dict[str, Tensor]:
    return random(
        {f"{module}.lora_A.default.weight": (rank, columns), f"{module}.lora_B.default.weight": (rows, rank)}, seed=seed
    )


def change(lora: Mapping[str, Tensor], module: str) -> Tensor:
    return lora[f"{module}.lora_B.default.weight"] @ lora[f"{module}.lora_A.default.weight"]


@pytest.fixture
def save(tmp_path):
    """Write a file of tensors."""

    def save(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
        save_file(dict(tensors), tmp_path / name, metadata)
        return tmp_path / name

    return save


@pytest.fixture
def run(tmp_path):
    """Merge into a base; return the result's tensors and messages."""

    def run(
        base: Path, *loras: Path | WeightedFile, output: str = "out", **choices
    ) -> tuple[dict[str, Tensor], MergeResult]:
        given = [lora if isinstance(lora, WeightedFile) else WeightedFile(lora) for lora in loras]
        plan = plan_merge(open_base(str(base), tmp_path), given, tmp_path / output, **choices)
        result = merge(plan, InputHashes(plan.hashed), SilentReporter())
        files = sorted((tmp_path / output).glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}, result

    return run


@pytest.mark.parametrize("at_once", [2**20, 5, 1])
def test_weights_change_by_the_sum_and_all_else_stays(save, run, at_once, monkeypatch):
    """Two LoRAs with different ranks and scales, one with a negative weight; in pieces of any size."""
    monkeypatch.setattr(merging, "ELEMENTS_AT_ONCE", at_once)
    base, first, second = random(QWEN), halves(Q) | halves(K, seed=5), halves(Q, rank=3, seed=2)
    scaled = {f"diffusion_model.{name.replace('.default', '')}": tensor for name, tensor in second.items()}
    scaled[f"diffusion_model.{Q}.alpha"] = torch.tensor(6.0)
    paths = save("base.safetensors", base), save("a.safetensors", first), save("b.safetensors", scaled)
    found, result = run(paths[0], paths[1], WeightedFile(paths[2], -0.5))
    assert_close(found[f"{Q}.weight"], base[f"{Q}.weight"] + change(first, Q) - 0.5 * 2 * change(second, Q))
    assert_close(found[f"{K}.weight"], base[f"{K}.weight"] + change(first, K))
    assert all(found[name].equal(base[name]) for name in base if name not in (f"{Q}.weight", f"{K}.weight"))
    assert result.error.value < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_rounded_once_after_the_sum_and_the_loss_is_told(save, run, dtype):
    base, first, second = random(QWEN, dtype), halves(Q), halves(Q, seed=2)
    paths = save("base.safetensors", base), save("a.safetensors", first), save("b.safetensors", second)
    found, result = run(*paths)
    weight, added = base[f"{Q}.weight"].float(), change(first, Q) + change(second, Q)
    assert found[f"{Q}.weight"].equal((weight + added).to(dtype))
    lost = (found[f"{Q}.weight"].float() - weight - added).norm() / added.norm()
    assert result.error.value == pytest.approx(float(lost), rel=1e-3)
    assert result.errors[0].value == pytest.approx(float(lost), rel=1e-3)


def test_the_loss_of_each_is_that_of_the_weights_it_changes(save, run):
    first, second = halves(Q), halves(K, seed=2)
    paths = save("base.safetensors", random(QWEN, torch.bfloat16)), save("a.safetensors", first)
    _, result = run(*paths, save("b.safetensors", second))
    asked = [float(change(first, Q).norm()) ** 2, float(change(second, K).norm()) ** 2]
    assert [error.exact_squared for error in result.errors] == pytest.approx(asked, rel=1e-5)
    assert result.error.exact_squared == pytest.approx(sum(asked), rel=1e-5)


@pytest.mark.parametrize("at_once", [2**18, WIDTH])
def test_a_lora_of_separate_modules_in_a_fused_base(save, run, at_once, monkeypatch):
    """Rows of parts without a LoRA stay byte-identical, including minus zero."""
    monkeypatch.setattr(merging, "ELEMENTS_AT_ONCE", at_once)
    base = random(FLUX, torch.bfloat16)
    base["double_blocks.0.img_attn.qkv.weight"][2 * WIDTH :, 0] = -0.0
    lora = {}
    for part, rank in (("q", 1), ("k", 2)):
        named = halves(f"transformer.transformer_blocks.0.attn.to_{part}", rank=rank, seed=rank)
        lora |= {name.replace(".default", ""): tensor for name, tensor in named.items()}
    found, _ = run(save("base.safetensors", base), save("lora.safetensors", lora))
    expected = base["double_blocks.0.img_attn.qkv.weight"].clone()
    for place, part in enumerate("qk"):
        name = f"transformer.transformer_blocks.0.attn.to_{part}"
        rows = slice(place * WIDTH, (place + 1) * WIDTH)
        expected[rows] = (expected[rows].float() + lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]).to(
            torch.bfloat16
        )
    merged = found["double_blocks.0.img_attn.qkv.weight"]
    assert merged.view(torch.int16).equal(expected.view(torch.int16))


def test_a_lora_of_a_fused_module_in_a_separate_base(save, run):
    """And of a modulation whose halves are in the other order in diffusers."""
    base = random(FLUX_DIFFUSERS)
    fused, last = halves("blocks.0.attn.a_to_qkv", rows=3 * WIDTH), halves("final_norm_out.linear", rows=2 * WIDTH)
    kohya = {}
    for stem, lora, name in (
        ("double_blocks_0_img_attn_qkv", fused, "blocks.0.attn.a_to_qkv"),
        ("final_layer_adaLN_modulation_1", last, "final_norm_out.linear"),
    ):
        kohya[f"lora_unet_{stem}.lora_down.weight"] = lora[f"{name}.lora_A.default.weight"]
        kohya[f"lora_unet_{stem}.lora_up.weight"] = lora[f"{name}.lora_B.default.weight"]
        kohya[f"lora_unet_{stem}.alpha"] = torch.tensor(1.0)
    found, _ = run(save("base.safetensors", base), save("lora.safetensors", kohya))
    whole = 0.5 * change(fused, "blocks.0.attn.a_to_qkv")
    for place, part in enumerate("qkv"):
        name = f"transformer_blocks.0.attn.to_{part}.weight"
        assert_close(found[name], base[name] + whole[place * WIDTH : (place + 1) * WIDTH])
    moved = 0.5 * change(last, "final_norm_out.linear").roll(WIDTH, 0)
    assert_close(found["norm_out.linear.weight"], base["norm_out.linear.weight"] + moved)


@pytest.fixture
def sharded(tmp_path):
    """A bfloat16 base in two shards with additional keys in its index."""
    base = random(QWEN, torch.bfloat16)
    folder = tmp_path / "base"
    folder.mkdir()
    weight_map = {}
    for number, part in enumerate((list(base)[:3], list(base)[3:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: base[name] for name in part}, folder / file, {"format": "pt", "said": str(number)})
        weight_map |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 1, "more": "yes"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as stream:
        return stream.metadata()


def test_shards_index_and_metadata_stay_and_tell_what_they_are_made_of(sharded, save, run, tmp_path):
    lora = save("lora.safetensors", halves(Q))
    run(sharded, WeightedFile(lora, 0.5))
    names = sorted(path.name for path in sharded.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert (tmp_path / "out" / names[-1]).read_bytes() == (sharded / names[-1]).read_bytes()
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (*sharded.iterdir(), lora)}
    for number, name in enumerate(names[:2], start=1):
        with (
            safe_open(tmp_path / "out" / name, framework="pt") as new,
            safe_open(sharded / name, framework="pt") as old,
        ):
            assert new.keys() == old.keys(), "in the same order"
            assert all(new.get_tensor(key).dtype == old.get_tensor(key).dtype for key in old.keys())  # noqa: SIM118
        metadata = metadata_of(tmp_path / "out" / name)
        (recorded,) = json.loads(metadata.pop(MERGED))
        assert metadata == {"format": "pt", "said": str(number)}
        assert recorded["base"] == {name: digests[name] for name in names[:2]}
        assert recorded["loras"] == [{"file": lora.name, "sha256": digests[lora.name], "weight": 0.5}]


def test_a_second_merge_is_told_behind_the_first(save, run, tmp_path):
    base, lora = save("base.safetensors", random(QWEN)), save("lora.safetensors", halves(Q))
    run(base, lora)
    run(tmp_path / "out" / "base.safetensors", WeightedFile(lora, -1.0), output="again")
    recorded = json.loads(metadata_of(tmp_path / "again" / "base.safetensors")[MERGED])
    assert [entry["loras"][0]["weight"] for entry in recorded] == [1.0, -1.0]


def test_the_same_inputs_give_the_same_bytes(sharded, save, run, tmp_path):
    lora = save("lora.safetensors", halves(Q))
    for output in ("first", "second"):
        run(sharded, lora, output=output)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_shards_of_another_size_and_format(sharded, save, run, tmp_path):
    lora = halves(Q)
    found, result = run(sharded, save("lora.safetensors", lora), dtype="float32", max_shard_bytes=300)
    base = {name: tensor for path in sharded.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert {tensor.dtype for tensor in found.values()} == {torch.float32} and result.error.value < 1e-6
    assert_close(found[f"{Q}.weight"], base[f"{Q}.weight"].float() + change(lora, Q))
    assert all(found[name].equal(base[name].float()) for name in base if name != f"{Q}.weight")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == base.keys() and len(set(index["weight_map"].values())) > 2


def test_plain_8_bit_floats_with_a_format_to_write(save, run):
    base = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in random(QWEN).items()}
    lora = halves(Q)
    found, _ = run(save("base.safetensors", base), save("lora.safetensors", lora), dtype="bfloat16")
    assert found[f"{Q}.weight"].equal((base[f"{Q}.weight"].float() + change(lora, Q)).bfloat16())
    assert found["img_in.weight"].equal(base["img_in.weight"].bfloat16())


def test_parts_of_a_text_encoder_are_left_out_when_allowed(save, run):
    lora = halves(Q) | {"text_encoder.layers.0.q.lora_A.weight": torch.ones(1, 2)}
    base = random(QWEN)
    found, _ = run(save("base.safetensors", base), save("lora.safetensors", lora), allow_unmatched=True)
    assert_close(found[f"{Q}.weight"], base[f"{Q}.weight"] + change(lora, Q))


@pytest.mark.parametrize(
    ("base", "lora", "choices", "message"),
    [
        ({}, halves("gone"), {}, names("2 of 2", "no module")),
        ({}, halves("gone"), {"allow_unmatched": True}, names("2 of 2", "no module")),
        (
            {},
            halves(Q) | {"text_encoder.q.lora_A.weight": torch.ones(1, 2)},
            {},
            names("1 of 3", "no module", "Qwen-Image", "1 of them", "text_encoder.q.lora_A.weight"),
        ),
        ({}, halves(Q) | {f"{Q}.dora_scale": torch.ones(4)}, {"allow_unmatched": True}, names("DoRA")),
        ({}, {f"{Q}.lora_magnitude_vector.default.weight": torch.ones(4)}, {}, names("DoRA")),
        ({}, {f"lora_unet_{Q.replace('.', '_')}.lokr_w1": torch.ones(2, 2)}, {}, names("LoKr")),
        ({}, {f"lora_unet_{Q.replace('.', '_')}.hada_w1_a": torch.ones(2, 2)}, {}, names("LoHa")),
        ({}, halves(Q, columns=3), {}, names("not match", "weight")),
        ({}, halves(Q) | {f"{Q}.lora_B.default.weight": torch.full((WIDTH, 2), torch.nan)}, {}, names("NaN or Inf")),
        ({f"{Q}.weight": torch.full((WIDTH, WIDTH), 1e30)}, halves(Q), {"dtype": "float16"}, names("NaN or Inf", "F16")),
        ({f"{Q}.weight": torch.full((WIDTH, WIDTH), torch.nan)}, halves(Q), {}, names(f"{Q}.weight", "NaN or Inf")),
        ({f"{Q}.weight": torch.ones(WIDTH, WIDTH).to(torch.float8_e5m2)}, halves(Q), {}, names("F8_E5M2", "rounding")),
        ({f"{Q}.weight": torch.ones(WIDTH, WIDTH, dtype=torch.int8)}, halves(Q), {}, names("I8", "not floating point")),
        ({f"{Q}.scale_weight": torch.ones(1)}, halves(Q), {"dtype": "bfloat16"}, names("quantized", f"{Q}.scale_weight")),
        ({f"{Q}.weight.absmax": torch.ones(1)}, halves(Q), {}, names("quantized")),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_and_nothing_written(says, save, run, tmp_path, base, lora, choices, message):
    paths = save("base.safetensors", random(QWEN) | base), save("lora.safetensors", lora)
    with pytest.raises(DiffSynthError) as caught:
        run(*paths, **choices)
    says(caught.value.problems)
    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()


def test_weights_of_no_known_component_are_refused(says, save, run):
    with pytest.raises(DiffSynthError) as caught:
        run(save("base.safetensors", {"x": torch.ones(2)}), save("lora.safetensors", halves(Q)))
    says(caught.value.problems)
    assert str(caught.value) == names("no component", "Qwen-Image, Wan, FLUX.1, FLUX.2")


def test_a_file_that_has_the_name_comes_before_a_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:0.5").touch()
    assert parse_lora("a:0.5") == WeightedFile(Path("a:0.5"))
    assert parse_lora("b:0.5") == WeightedFile(Path("b"), 0.5)
    assert parse_lora("a:0.5:-2") == WeightedFile(Path("a:0.5"), -2.0)
    assert parse_lora("a:b.safetensors") == WeightedFile(Path("a:b.safetensors"))
    with pytest.raises(DiffSynthError, match="the weight is not a finite number"):
        parse_lora("b:nan")
