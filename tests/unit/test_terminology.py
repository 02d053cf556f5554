"""Words that docs/terminology.md replaces do not occur in code, messages, recipes and documentation."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("core/**/*.py", "diffsynth_cli/**/*.py", "recipes/**/*.yaml", "tests/**/*.py", "tests/**/*.ambr", "docs/*.py",
         "docs/*.md", "README.md")  # fmt: skip
AVOIDED = {
    "picture": r"(?i)picture",
    "number format": r"(?i)number formats?\b",
    "mend": r"(?i)\bmend(s|ed|ing)?\b",
    "anew": r"(?i)\banew\b",
    "half a character": r"(?i)\bhalf a character\b",
    "stands twice": r"(?i)\bstands? (there )?twice\b",
    "goes over": r"(?i)\bgoes over\b",
    "means nothing": r"(?i)\bmeans nothing\b",
    "stranger": r"(?i)stranger",
    "no finite number": r"(?i)\bno finite numbers?\b",
    "dialect": r"(?i)\bdialects?\b",
    "two halves": r"(?i)\btwo halves\b",
    "without a word": r"(?i)\bwithout a word\b",
    "in silence": r"(?i)\bin silence\b",
    "of one's own": r"(?i)\bof one's own\b",
    "as far as names tell": r"(?i)\bas far as names tell\b",
    "let go of": r"(?i)\blets? go of\b",
    "gone on": r"(?i)\bgone on\b",
    "from here on": r"(?i)\bfrom here on\b",
    "cut short": r"(?i)\bcut short\b",
    "other bytes": r"(?i)\bother bytes\b",
    "colour": r"(?i)colour",
    "grey": r"(?i)(\b|_)grey",
    "centre": r"(?i)\bcentre",
    "licence": r"(?i)licence",
    "neighbour": r"(?i)(neighb|behavi)our",
    "normalise": r"(?i)(normal|recogn|quant|initial|optim|serial|organ|summar|minim|maxim|final|synchron)is(e|ing|ation)",
}
ALLOWED = re.compile(
    r"Picture \{+number\}|\"Picture\"|`Picture`|Picture [12]:"  # the prompt of Qwen-Image-Edit-2509
    r"|`pictures` is the name|\"pictures\": self|\"pictures\"\] == "  # a key of JSON that scripts know
    r"|IMAGE_COLOURS|near[_-]duplicate[_-]colour"  # a code and a flag that scripts know
    r"|grey towers at night|a grey lift"  # captions of synthetic media, which the numbers of rehearsals depend on
)
PAGE = ROOT / "docs/terminology.md"


def paths() -> list[Path]:
    found = [path for pattern in FILES for path in ROOT.glob(pattern) if "fixtures" not in path.parts]
    return [path for path in found if path not in (PAGE, Path(__file__))]


@pytest.mark.parametrize("word", AVOIDED)
def test_a_word_to_avoid_is_on_the_page_and_nowhere_else(word):
    assert word in PAGE.read_text()
    places = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(AVOIDED[word], ALLOWED.sub("", line))
    ]
    assert not places, "\n".join(places)
