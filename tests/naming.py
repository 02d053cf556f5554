"""What a message names: the file, the row, the value, the way out. Its wording stands on the page of its test."""

import re


class names:  # noqa: N801 - reads as a function, like `pytest.approx`
    """Equal to a text one line of which names all of these, in this order and as whole words.

    `assert message == names("a.png", "row 3", "--max_pixels")`. A value that is not in the message, that is one of a
    longer name (`8` in `128`, `a.png` in `aa.png`) or that stands before an earlier one is listed by the failure.
    Parts may be `names` themselves.
    """

    __hash__ = None

    def __init__(self, *parts: object) -> None:
        assert parts, "a message names something"
        self.parts = [word for part in parts for word in (part.parts if isinstance(part, names) else [str(part)])]
        self.missing = ""

    def format(self, **values: object) -> "names":
        """Fill in what a table of cases cannot know, as `{path}`."""
        return names(*(part.format(**values) for part in self.parts))

    def __eq__(self, text: object) -> bool:
        if not isinstance(text, str):
            return False
        absent = [part for part in self.parts if not re.search(_whole(part), text)]
        together = any(re.search(".*".join(map(_whole, self.parts)), line) for line in text.splitlines())
        self.missing = "" if together else f" without {absent}" if absent else " not on one line in this order"
        return together

    def __repr__(self) -> str:
        return f"names({', '.join(map(repr, self.parts))}){self.missing}"


class in_any_order:  # noqa: N801
    """Equal to a list of these, which may stand in any order: `assert problems == in_any_order(TO_QQ, NO_FOLDER)`."""

    __hash__ = None

    def __init__(self, *expected: object) -> None:
        self.expected = expected

    def __eq__(self, found: object) -> bool:
        if not isinstance(found, list) or len(found) != len(self.expected):
            return False
        left = list(found)
        for one in self.expected:
            if one not in left:
                return False
            left.remove(one)
        return True

    def __repr__(self) -> str:
        return f"in_any_order{self.expected}"


def _whole(part: str) -> str:
    """A pattern of it that does not match inside of a longer name or number."""
    before = r"(?<![\w/.-])" if re.match(r"[\w/.-]", part) else ""
    after = r"(?![\w/-]|\.\w)" if re.search(r"[\w/-]$", part) else ""
    return before + re.escape(part) + after
