"""LoRA of modules and their parts, by rows of B; key maps split these rows as they split tensors."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from diffsynth_core.conversion.lora_tensors import write_lora
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.flux import keys as flux
from diffsynth_core.models.flux2 import keys as flux2
from diffsynth_core.weights.key_maps import SAME_NAMES, TableMap, count_rows, take_rows
from diffsynth_core.weights.lora import LoraPair, RowSpan, StoredTensor, joint_rank, lora_scale
from diffsynth_core.weights.lora import translate as translate_names
from diffsynth_core.weights.lora_formats import LoraNaming
from diffsynth_core.weights.weight_sets import Span

FUSED = TableMap({"out": "o"}, fused={"qkv": ("q", "k", "v")}, swap_halves={"mod": "m"})
NAMING = LoraNaming("dit", {"diffusers": FUSED}, {"kohya": TableMap({}, fused={"all": ("qkv", "out")})})


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (flux.DIT, "blocks.0.attn.a_to_qkv"),
        (flux.DIT, "single_blocks.3.to_qkv_mlp"),
        (flux.DIT, "final_norm_out.linear"),
        (flux.DIT, "blocks.0.ff_a.0"),
        (flux2.DIT_ORIGINAL, "double_blocks.7.txt_attn.qkv"),
        (flux2.DIT_ORIGINAL, "final_layer.adaLN_modulation.1"),
        (SAME_NAMES, "anything"),
    ],
)
def test_rows_are_those_that_a_tensor_is_cut_into(names, name):
    tensor = torch.arange(42)[:, None]
    cut = names.split(name, tensor)
    rows = names.split_rows(name, 42)
    assert rows.keys() == cut.keys() == names.row_fractions(name).keys()
    for own, spans in rows.items():
        assert [row for begin, end in spans for row in range(begin, end)] == cut[own][:, 0].tolist()
        assert names.row_fractions(name)[own] == Fraction(len(cut[own]), 42) == Fraction(count_rows(spans), 42)
    assert sum(names.row_fractions(name).values()) == 1


def test_rows_are_taken_in_their_order():
    assert take_rows(((4, 8), (0, 4)), 2, 6) == ((6, 8), (0, 2))
    assert take_rows(((4, 8), (0, 4)), 0, 4) == ((4, 8),)
    assert take_rows(((0, 4),), 4, 4) == ()


def lora(module: str, rows: int, path: Path = Path("a"), begin: int = 0, alpha: float | None = None) -> LoraPair:
    """A LoRA of rank 2 in float32 with 4 columns."""
    down = StoredTensor("F32", (2, 4), Span(path, begin, begin + 32))
    return LoraPair(module, down, StoredTensor("F32", (rows, 2), Span(path, begin + 32, begin + 32 + rows * 8)), alpha)


def translate(loras, naming: LoraNaming, source: str, target: str):
    return translate_names(loras, naming.vocabulary(source), naming.vocabulary(target))


def test_a_part_takes_its_rows_and_a_whole_those_of_its_parts():
    one = lora("qkv", 6)
    assert translate({"qkv": one}, NAMING, "diffsynth", "diffusers") == {
        "q": (RowSpan(one, 0, 2),), "k": (RowSpan(one, 2, 4),), "v": (RowSpan(one, 4, 6),),
    }  # fmt: skip
    parts = {name: lora(name, 2) for name in "qkv"}
    assert translate(parts, NAMING, "diffusers", "diffsynth") == {
        "qkv": tuple(RowSpan(parts[name], 0, 2) for name in "qkv")
    }


def test_what_nothing_changes_is_rows_without_a_lora():
    only = lora("k", 2)
    assert translate({"k": only}, NAMING, "diffusers", "diffsynth") == {
        "qkv": (RowSpan(None, 0, 2), RowSpan(only, 0, 2), RowSpan(None, 0, 2))
    }
    assert translate({"k": only}, NAMING, "diffusers", "diffusers") == {"k": (RowSpan(only, 0, 2),)}


def test_halves_that_stand_in_another_order_come_back():
    one = lora("mod", 6)
    assert translate({"mod": one}, NAMING, "diffsynth", "diffusers") == {"m": (RowSpan(one, 3, 6), RowSpan(one, 0, 3))}
    back = lora("m", 6)
    assert translate({"m": back}, NAMING, "diffusers", "diffsynth") == {
        "mod": (RowSpan(back, 3, 6), RowSpan(back, 0, 3))
    }


def test_wholes_of_wholes_are_cut_to_the_parts():
    one = lora("all", 12)
    assert translate({"all": one}, NAMING, "kohya", "diffusers") == {
        "q": (RowSpan(one, 0, 2),), "k": (RowSpan(one, 2, 4),), "v": (RowSpan(one, 4, 6),), "o": (RowSpan(one, 6, 12),),
    }  # fmt: skip


def test_parts_that_do_not_fit_each_other_are_refused():
    with pytest.raises(DiffSynthError, match="do not match: lora_B has 2, 3 rows, lora_A 4 columns"):
        translate({"q": lora("q", 2), "k": lora("k", 3)}, NAMING, "diffusers", "diffsynth")


@pytest.mark.parametrize(
    ("scales", "lora_format", "alpha", "applied"),
    [
        ((None, None), "kohya", 4.0, ()),
        ((1.0, 1.0), "kohya", 2.0, ()),
        ((1.0, 4.0), "kohya", 4.0, (0.5, 2.0)),
        ((1.0, None), "comfyui", 4.0, (0.5,)),
        ((None, None), "comfyui", None, ()),
        ((1.0, 1.0), "diffusers", None, (0.5,)),
    ],
)
def test_alphas_of_two_that_become_one(tmp_path, scales, lora_format, alpha, applied):
    """Rank 2 each, with different A: equal scales stay an alpha, others are multiplied into B."""
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(200)))
    first, second = lora("q", 2, path, 0, scales[0]), lora("k", 2, path, 48, scales[1])
    written = write_lora("qk", (RowSpan(first, 0, 2), RowSpan(second, 0, 2)), lora_format)
    assert (written.ranks, written.rank, written.scales, written.exact) == ((2, 2), 4, applied, True)
    stored = {tensor.name: tensor for tensor in written.tensors if tensor.name.endswith(".alpha")}
    if alpha is None:
        assert not stored
    else:
        ((tensor,),) = (list(stored.values()),)
        (data,) = tensor.source()
        assert torch.frombuffer(bytearray(data), dtype=torch.float32).item() == alpha


@pytest.mark.parametrize(
    ("alpha", "rslora", "scale"),
    [(None, False, 1.0), (None, True, 1.0), (8.0, False, 2.0), (8.0, True, 4.0), (0.0, True, 0.0)],
)
def test_the_scale_is_alpha_by_rank_or_by_its_root(alpha, rslora, scale):
    assert lora_scale(alpha, 4, rslora) == scale


def test_the_joint_rank_counts_an_equal_a_once(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(200)))
    first, same, other = lora("q", 2, path, 0), lora("k", 2, path, 0), lora("v", 2, path, 48)
    assert joint_rank((RowSpan(first, 0, 2), RowSpan(same, 0, 2))) == 2
    assert joint_rank((RowSpan(first, 0, 2), RowSpan(None, 0, 2), RowSpan(other, 0, 2))) == 4


@pytest.mark.parametrize(("alphas", "rank"), [((1.0, 1.0), 2), ((None, 2.0), 2), ((1.0, 4.0), 4)])
def test_one_a_is_kept_once_where_the_scales_are_the_same(tmp_path, alphas, rank):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(200)))
    first, second = (lora(name, 2, path, 0, alpha) for name, alpha in zip("qk", alphas, strict=True))
    assert write_lora("qk", (RowSpan(first, 0, 2), RowSpan(second, 0, 2)), "kohya").rank == rank


def test_numbers_that_are_only_copied_are_not_computed_with(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(100))
    small = StoredTensor("F8_E4M3", (2, 4), Span(path, 0, 8))
    up = StoredTensor("F8_E4M3", (4, 2), Span(path, 8, 16))
    assert write_lora("q", (RowSpan(LoraPair("q", small, up), 0, 4),), "diffusers").exact
    with pytest.raises(DiffSynthError, match="has to be recomputed, which is not supported for dtype F8_E4M3"):
        write_lora("q", (RowSpan(LoraPair("q", small, up, alpha=1.0), 0, 4),), "diffusers")
