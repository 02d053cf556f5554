"""Checks of images, captions, pairs and the whole dataset: each finds its fault, and nothing else."""

import csv
import json
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from diffsynth_core.data.conditions import Columns
from diffsynth_core.data.findings import CODES
from diffsynth_core.data.metadata import read_metadata
from diffsynth_core.data.rows import read_rows
from diffsynth_core.dataset_report import caption_checks, documents
from diffsynth_core.dataset_report.facts import ImageFacts
from diffsynth_core.dataset_report.images import difference_hash, examine_image, scaled_down
from diffsynth_core.dataset_report.near_duplicates import near_images
from diffsynth_core.dataset_report.rules import Rules
from diffsynth_core.dataset_report.thresholds import Thresholds
from diffsynth_core.dataset_report.validate import CheckOptions, validate
from diffsynth_core.models.size_facts import CaptionFacts
from diffsynth_core.models.token_counts import CaptionRule, count_tokens
from diffsynth_core.progress import SilentReporter, format_bytes
from tests.validation_corpus import rules_of_recipe

ROOT = Path(__file__).parents[3]
CORE = ROOT / "core" / "diffsynth_core"
COFFEE = Image.fromarray(skimage.data.coffee())
CHELSEA = Image.fromarray(skimage.data.chelsea())
ROCKET = Image.fromarray(skimage.data.rocket())
CLEAN = {"coffee.png": COFFEE, "chelsea.png": CHELSEA, "rocket.png": ROCKET}


@pytest.fixture
def found(tmp_path):
    """Check images and rows; return (code, row) of all findings but BUCKETS and CACHE_SIZE, and the report."""

    def check(images, rows, columns=("image", "prompt"), rules=None, depth="files"):
        for name, image in images.items():
            (image if callable(image) else image.save)(tmp_path / name)
        with (tmp_path / "metadata.csv").open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([columns, *rows])
        report, _ = validate(tmp_path, rules or Rules(), CheckOptions(depth, workers=1), SilentReporter())
        facts = ("BUCKETS", "CACHE_SIZE")
        return [(one.code, one.row) for one in report.findings if one.code not in facts], report

    return check


CLEAN_ROWS = [[name, f"a photograph of {name}"] for name in CLEAN]


def test_clean_images_have_no_finding(found):
    assert found(CLEAN, CLEAN_ROWS)[0] == []
    assert found(CLEAN, CLEAN_ROWS, rules=rules_of_recipe("qwen-image-lora", Thresholds()))[0] == []


def _as_png(path: Path) -> None:
    COFFEE.rotate(90, expand=True).save(path, "PNG")


@pytest.mark.parametrize(
    ("name", "image", "code"),
    [
        ("x.jpg", _as_png, "IMAGE_TYPE_MISMATCH"),
        ("x.png", COFFEE.resize((15, 40)), "IMAGE_TOO_SMALL"),
        ("x.png", COFFEE.crop((0, 0, 128, 31)), "IMAGE_CROP_LOSS"),
        ("x.jpg", COFFEE.rotate(180).convert("CMYK"), "IMAGE_MODE"),
        ("x.png", Image.fromarray(np.asarray(CHELSEA.convert("L").rotate(90)).astype(np.uint16) * 256), "IMAGE_MODE"),
        ("x.webp", lambda path: COFFEE.save(path, lossless=True), "IMAGE_DUPLICATE"),
        ("x.jpg", lambda path: COFFEE.resize((300, 200)).save(path, quality=70), "IMAGE_NEAR_DUPLICATE"),
        ("x.png", lambda path: path.write_bytes(_png_of(COFFEE)), "IMAGE_DUPLICATE"),
    ],
)
def test_a_faulty_image(found, name, image, code):
    codes, report = found({**CLEAN, name: image}, [*CLEAN_ROWS, [name, "another"]])
    if code == "IMAGE_CROP_LOSS":  # four to one is also next to the limit of the aspect
        codes = [one for one in codes if one[0] != "IMAGE_ASPECT"]
    assert codes == [(code, 4)], report.findings
    assert CODES[code].level == report.findings[0].level


def _png_of(image: Image.Image) -> bytes:
    import io

    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def test_images_that_are_shown_may_repeat(found):
    rows = [["coffee.png", "chelsea.png", "a"], ["rocket.png", "same.png", "b"]]
    assert found({**CLEAN, "same.png": CHELSEA}, rows, ("image", "edit_image", "prompt"))[0] == []


def test_near_images_are_all_found_and_no_others():
    """Against comparing all pairs."""
    generator = np.random.default_rng(0)
    hashes = [int(value) for value in generator.integers(0, 2**63, 300)]
    hashes += [
        value ^ (1 << int(bit)) ^ (1 << int(other))
        for value in hashes[:60]
        for bit, other in [generator.integers(0, 64, 2)]
    ]
    colors = [bytes(generator.integers(0, 256, 192, dtype=np.uint8)) for _ in range(300)]
    colors += [
        bytes(min(255, value + 5) for value in colors[index]) if index % 2 else colors[-1 - index]
        for index in range(60)
    ]
    images = [
        ImageFacts(str(index), 1, difference_hash=value, colors=color)
        for index, (value, color) in enumerate(zip(hashes, colors, strict=True))
    ]
    expected: dict[str, tuple[str, int]] = {}
    for one, other in combinations(images, 2):
        bits = (one.difference_hash ^ other.difference_hash).bit_count()
        apart = np.abs(np.frombuffer(one.colors, np.uint8).astype(int) - np.frombuffer(other.colors, np.uint8)).mean()
        if bits <= 3 and apart <= 12:
            expected.setdefault(other.path, (one.path, bits))
    assert near_images(images, 3, 12.0) == expected
    assert len(expected) == 30
    assert near_images(images, -1, 12.0) == {}


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["a", "a", "b"], [("CAPTION_DUPLICATE", 1)]),
        (["a", "a ", "a"], [("CAPTION_ALL_SAME", None)]),
        (
            ["a\x07b", "b\u200b", "fine\ttoo \U0001f468\u200d\U0001f469"],
            [("CAPTION_CONTROL_CHARS", 1), ("CAPTION_CONTROL_CHARS", 2)],
        ),
        (["x" * 2048, "word " * 409, "\u732b" * 512], []),
        (["x" * 2049, "y", "\u732b" * 513], [("CAPTION_TOO_LONG", 1), ("CAPTION_TOO_LONG", 3)]),
        (["  nan          ", "", "b"], [("CAPTION_NAN", 1), ("CAPTION_MISSING", 2)]),
    ],
)
def test_captions(found, captions, expected):
    rows = [[name, caption] for name, caption in zip(CLEAN, captions, strict=True)]
    assert found(CLEAN, rows, depth="metadata")[0] == expected


def test_one_instruction_for_all_edits_is_no_fault(found):
    rows = [["coffee.png", "chelsea.png", "make it night"], ["rocket.png", "chelsea.png", "make it night"]]
    assert found(CLEAN, rows, ("image", "edit_image", "prompt"))[0] == [("CAPTION_DUPLICATE", 1)]


def test_half_a_character_is_an_error(tmp_path):
    (tmp_path / "metadata.json").write_text(json.dumps([{"image": "a.png", "prompt": "a \ud83d"}]))
    report, _ = validate(tmp_path, Rules(), CheckOptions("metadata"), SilentReporter())
    (finding,) = report.findings
    assert (finding.code, finding.level, report.exit_code) == ("CAPTION_CONTROL_CHARS", "error", 1)


@pytest.mark.parametrize("family", ["qwen-image", "flux", "flux2", "wan"])
def test_tokens_are_counted_as_transformers_counts_them(tiny_families, monkeypatch, family):
    from transformers import AutoTokenizer

    from tests.loras import RECIPES

    tiny = tiny_families(family)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny.base))
    rule = rules_of_recipe(RECIPES[family], Thresholds()).captions
    assert rule is not None and rule.tokenizer is not None
    captions = [
        "a cat",
        "Don't  count\n\nthe   blanks: 12345 caf\u00e9 \u732b\u304c\u3044\u308b \U0001f600!",
        "a" * 3000,
        "",
    ]
    reference = AutoTokenizer.from_pretrained(rule.tokenizer)
    if family == "flux2":
        texts = [
            reference.apply_chat_template(
                [{"role": "user", "content": caption}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for caption in captions
        ]
    else:
        texts = [rule.facts.template.format(rule.facts.clean(caption)) for caption in captions]
    expected = [len(reference(text, verbose=False)["input_ids"]) - rule.facts.dropped for text in texts]
    assert count_tokens(captions, rule) == (expected, True)


def test_tokens_are_counted_from_pairs_as_well(tmp_path):
    """The published Qwen-Image has no tokenizer.json."""
    from transformers import Qwen2Tokenizer

    from diffsynth_core.models.qwen_image.captions import TEXT
    from tests.qwen_pairs import write_qwen_pairs

    write_qwen_pairs(tmp_path)
    captions = ["Don't  count\n\nthe   blanks: 12345 caf\u00e9 \u732b \U0001f600!", "the theme then"]
    reference = Qwen2Tokenizer.from_pretrained(tmp_path)
    expected = [len(reference(TEXT.template.format(text))["input_ids"]) - TEXT.dropped for text in captions]
    assert count_tokens(captions, CaptionRule(TEXT, tmp_path)) == (expected, True)


def test_a_tokenizer_that_cannot_be_read_leaves_an_estimate(tmp_path):
    rule = rules_of_recipe("wan2.1-t2v-1.3b-lora", Thresholds()).captions
    (tmp_path / "tokenizer.json").write_text("{}")
    assert count_tokens(["four letters a token"], replace(rule, tokenizer=tmp_path)) == ([6], False)


PAIRS = ("image", "controlnet_image", "mask", "prompt")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"shown.png": CHELSEA.resize((300, 300))}, [("PAIR_ASPECT", 1)]),
        ({"shown.png": COFFEE}, [("PAIR_IDENTICAL", 1)]),
        ({"mask.png": Image.new("L", COFFEE.size)}, [("MASK_EMPTY", 1)]),
        ({"mask.png": Image.new("L", COFFEE.size, 255)}, [("MASK_EMPTY", 1)]),
        ({"mask.png": Image.new("RGB", COFFEE.size, "red")}, [("MASK_EMPTY", 1)]),
        (
            {"mask.png": COFFEE.convert("L").resize((300, 200)).point(lambda value: 255 * (value > 128))},
            [("MASK_SIZE", 1)],
        ),
    ],
)
def test_images_that_belong_together(found, changes, expected):
    mask = COFFEE.convert("L").point(lambda value: 255 * (value > 128))
    images = {"coffee.png": COFFEE, "shown.png": COFFEE.convert("L").convert("RGB"), "mask.png": mask, **changes}
    assert found(images, [["coffee.png", "shown.png", "mask.png", "a cup"]], PAIRS)[0] == expected


def test_a_mask_that_marks_one_pixel_is_not_empty(tmp_path):
    mask = Image.new("L", (1500, 1000))
    mask.save(tmp_path / "empty.png")
    mask.putpixel((700, 500), 255)
    mask.save(tmp_path / "dot.png")
    assert [examine_image(tmp_path, name, None).spread for name in ("empty.png", "dot.png")] == [0, 255]


def test_an_image_scaled_down_shows_the_mean_of_a_fine_pattern():
    values = np.zeros((1024, 1024, 3), np.uint8)
    values[::2, ::2] = 255
    fields = scaled_down(Image.fromarray(values)).resize((8, 8), Image.Resampling.BOX)
    assert np.abs(np.asarray(fields) - 255 / 4).max() < 20


@pytest.mark.parametrize("name", ["chelsea", "coffee", "astronaut"])
@pytest.mark.parametrize("scale", [0.5, 0.7, 1.3])
def test_an_image_keeps_its_hash_at_other_sizes(name, scale):
    image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    image = image.resize((image.width * 3, image.height * 3), Image.Resampling.BICUBIC)
    other = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    bits = difference_hash(scaled_down(image)) ^ difference_hash(scaled_down(other))
    assert bits.bit_count() <= Thresholds().near_duplicate_distance


def test_a_caption_may_have_more_tokens_than_characters(found, monkeypatch):
    """Byte-level tokenizers split a character into several tokens; the preselection of captions must allow for that."""
    monkeypatch.setattr(
        caption_checks, "count_tokens", lambda texts, rule: ([len(text.encode()) for text in texts], True)
    )
    rules = replace(Rules(), captions=CaptionRule(CaptionFacts("", 100, 0)))
    captions = ["🙂" * 26, "🙂" * 25, "x" * 101, "x" * 100]
    rows = [[f"{number}.png", caption] for number, caption in enumerate(captions)]
    assert found({}, rows, rules=rules, depth="metadata")[0] == [("CAPTION_TOO_LONG", 1), ("CAPTION_TOO_LONG", 3)]


@pytest.mark.parametrize(("levels", "codes"), [((128, 132), [("MASK_EMPTY", 1)]), ((128, 133), [])])
def test_a_mask_of_one_color_but_for_noise_is_empty(found, levels, codes):
    mask = Image.new("L", COFFEE.size, levels[0])
    mask.paste(levels[1], (0, 0, COFFEE.width // 2, COFFEE.height))
    rows = [["coffee.png", "mask.png", "a"]]
    assert found({"coffee.png": COFFEE, "mask.png": mask}, rows, ("image", "mask", "prompt"))[0] == codes


def test_repeated_samples_fill_batches(found):
    rules = replace(rules_of_recipe("qwen-image-lora", Thresholds()), batch_size=2, repeat=2)
    _, report = found(CLEAN, CLEAN_ROWS, rules=rules)
    assert "short" not in next(one.message for one in report.findings if one.code == "BUCKETS")


def test_the_fingerprint_tells_other_pixels_of_the_same_size(tmp_path, found):
    images = [Image.fromarray(np.full((64, 64, 3), level, np.uint8)) for level in (10, 20)]
    prints = []
    for image in images:
        prints.append(found({"x.bmp": image}, [["x.bmp", "a"]])[1].fingerprint)
        assert (tmp_path / "x.bmp").stat().st_size == 64 * 64 * 3 + 54
    assert prints[0] != prints[1]


def test_a_turned_tiff_is_upright_once(tmp_path):
    """Pillow rotates it while decoding; rotated again it would lie on its other side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    COFFEE.rotate(90, expand=True).save(tmp_path / "turned.tif", exif=exif)
    COFFEE.save(tmp_path / "upright.png")
    turned, upright = (examine_image(tmp_path, name, None) for name in ("turned.tif", "upright.png"))
    assert (turned.orientation, turned.width, turned.height) == (6, *COFFEE.size)
    assert turned.sketch == upright.sketch


def test_short_buckets_and_steps(found):
    rules = replace(rules_of_recipe("qwen-image-lora", Thresholds()), batch_size=2, repeat=3, accumulation=2)
    _, report = found(CLEAN, CLEAN_ROWS, rules=rules)
    message = next(one.message for one in report.findings if one.code == "BUCKETS")
    assert message == (
        "3 training sizes: 1 of 592 x 400, 1 of 448 x 288, 1 of 640 x 416; 3 steps per epoch (batch size 2, 2 batches a "
        "step, the data repeated 3 times), the last batch of 3 of 3 buckets is short"
    )


@pytest.mark.parametrize(
    ("recipe", "latents", "states"),
    [
        ("qwen-image-lora", 16 * 64 * 64, 15 * 3584),
        ("flux.1-dev-lora", 16 * 64 * 64, 512 * 4096 + 768),
        ("flux.2-klein-base-4b-lora", 128 * 32 * 32, 512 * 3 * 2560),
        ("flux.2-klein-base-9b-lora", 128 * 32 * 32, 512 * 3 * 4096),
        ("wan2.1-t2v-1.3b-lora", 16 * 60 * 104, 11 * 4096),
        ("wan2.1-i2v-14b-480p-lora", 36 * 60 * 104, 11 * 4096 + 257 * 1280),
    ],
)
def test_the_size_of_the_cache(tmp_path, found, recipe, latents, states):
    """One image of 512 x 512 (Wan: of 832 x 480) and a caption of ten estimated tokens and those added."""
    rules = replace(rules_of_recipe(recipe, Thresholds(max_crop_loss=1.0)), cache=tmp_path / "not" / "there")
    _, report = found({"a.png": CHELSEA.resize((512, 512))}, [["a.png", "x" * 40]], (rules.target, "prompt"), rules)
    (finding,) = [one for one in report.findings if one.code == "CACHE_SIZE"]
    assert f"about {format_bytes(latents * 4 + states * 2)} in" in finding.message


def test_a_cache_without_room_is_a_warning(found, monkeypatch):
    monkeypatch.setattr("diffsynth_core.dataset_report.set_checks.free_bytes", lambda folder: 1000)
    _, report = found(CLEAN, CLEAN_ROWS, rules=rules_of_recipe("qwen-image-lora", Thresholds()))
    assert [one.level for one in report.findings if one.code == "CACHE_SIZE"] == ["warning"]


def test_links_out_of_the_dataset_are_not_followed(tmp_path, monkeypatch):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    (inside / "real").mkdir(parents=True)
    outside.mkdir()
    COFFEE.save(outside / "coffee.png")
    (inside / "linked").symlink_to(outside)
    (inside / "coffee.png").symlink_to(outside / "coffee.png")
    (inside / "metadata.csv").write_text("image,prompt\nlinked/coffee.png,a\ncoffee.png,b\n")
    rows = read_rows(read_metadata(inside, None, "prompt", "image"), Columns("prompt", "image"), "named")
    assert [(one.code, one.row) for one in rows.findings] == [("PATH_OUTSIDE", 1), ("PATH_OUTSIDE", 2)]
    assert rows.present == frozenset() and rows.faulty == {1, 2}
    for depth in ("paths", "files"):
        report, dataset = validate(inside, Rules(), CheckOptions(depth, workers=1), SilentReporter())
        assert [(one.code, one.row) for one in report.findings] == [("PATH_OUTSIDE", 1), ("PATH_OUTSIDE", 2)], depth
        assert dataset.images == {}
    (inside / "metadata.csv").unlink()
    (inside / "coffee.txt").write_text("a cup")
    report, _ = validate(inside, Rules(), CheckOptions(workers=1), SilentReporter())
    assert [(one.code, one.path, one.level) for one in report.findings] == [
        ("PATH_OUTSIDE", "coffee.png", "error"),
        ("PATH_OUTSIDE", "linked", "warning"),
    ]


def test_every_code_is_found_by_something():
    modules = (*(CORE / "data").glob("*.py"), *(CORE / "dataset_report").glob("*.py"))
    sources = [path.read_text(encoding="utf-8") for path in modules if path.name != "findings.py"]
    named = {code for text in sources for code in re.findall(r'"([A-Z][A-Z0-9_]+)"', text)}
    assert CODES.keys() <= named


def test_the_codes_are_those_of_the_documentation():
    page = documents.checks_page()
    assert re.findall(r"^\| `([A-Z0-9_]+)` ", page, re.MULTILINE) == sorted(CODES, key=_place)
    assert (ROOT / "docs" / documents.PAGE).read_text(encoding="utf-8") == page


def _place(code: str) -> tuple[int, int]:
    from diffsynth_core.data.findings import SUBJECTS

    return list(SUBJECTS).index(CODES[code].subject), list(CODES).index(code)
