"""`diffsynth dataset validate --report`: what it writes, and what it refuses to overwrite."""

from pathlib import Path

import pytest

from tests.naming import names


@pytest.mark.parametrize("option", ["--report", "--report="])
def test_a_page_is_written_and_written_anew(cli, dataset: Path, option: str) -> None:
    page = Path("out/report.html")
    arguments = [f"{option}{page}"] if option.endswith("=") else [option, page]
    for _ in range(2):
        outcome = cli("dataset", "validate", dataset, "--workers", 1, *arguments)
        assert outcome.code == 0
        assert outcome.err == names("wrote", page) and "wrote" not in outcome.out
    text = page.read_text()
    assert text.endswith("</html>\n") and text.count("data:image") == 1 and '"chelsea.png":"/9j/' in text
    assert list(page.parent.iterdir()) == [page]


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("metadata.csv", names("--report", ".html", "{path}"), names("pass an .html path")),
        (
            "notes.html",
            names("{path}", "--report", "not a report"),
            names("new file name"),
        ),
        (
            "folder.html",
            names("{path}", "--report", "not a report"),
            names("new file name"),
        ),
    ],
)
def test_what_is_no_report_is_not_written_over(says, cli, dataset: Path, name: str, message: str, hint: str) -> None:
    path = dataset / name
    (dataset / "notes.html").write_text("<p>my notes</p>")
    (dataset / "folder.html").mkdir()
    before = path.read_bytes() if path.is_file() else None
    outcome = cli("dataset", "validate", dataset, "--report", path)
    assert outcome.code == 2 and outcome.out == ""
    says(outcome)
    assert outcome.err.splitlines() == [names("error:", message.format(path=path)), names("hint:", hint)]
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_link_to_a_report_is_not_followed(cli, dataset: Path) -> None:
    assert cli("dataset", "validate", dataset, "--report", "one.html").code == 0
    Path("link.html").symlink_to("one.html")
    assert cli("dataset", "validate", dataset, "--report", "link.html").code == 2
    assert Path("link.html").is_symlink()
