"""Color profiles built by hand (ICC.1:2001-04), because no system file contains them everywhere."""

import struct

D50 = (0.9642, 1.0, 0.8249)
PRIMARIES = {
    "Display P3": ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)),
    "Adobe RGB (1998)": ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)),
    "sRGB IEC61966-2.1": ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)),
}
"""XYZ of red, green and blue, adapted to D50."""


def rgb_profile(name: str) -> bytes:
    """Return the profile of an RGB space with `PRIMARIES`."""
    curve = _gamma(2.19921875) if name.startswith("Adobe") else _srgb_curve()
    colors = {f"{color}XYZ": _xyz(*values) for color, values in zip("rgb", PRIMARIES[name], strict=True)}
    return _profile(name, "RGB ", {**colors, **{f"{color}TRC": curve for color in "rgb"}})


def gray_profile(name: str, gamma: float) -> bytes:
    """Return a grayscale profile with one gamma."""
    return _profile(name, "GRAY", {"kTRC": _gamma(gamma)})


def ink_profile(name: str) -> bytes:
    """Return the profile of a printer with darker and duller inks than a screen."""
    corners = bytearray()
    for place in range(16):
        cyan, magenta, yellow, black = (place >> bit & 1 for bit in (3, 2, 1, 0))
        light = 100 * (1 - 0.45 * cyan) * (1 - 0.5 * magenta) * (1 - 0.1 * yellow) * (1 - 0.85 * black)
        a, b = 60 * (magenta - cyan) * (1 - black), 80 * (yellow - 0.6 * cyan) * (1 - black)
        corners += bytes([round(light * 2.55), round(a + 128), round(b + 128)])
    same = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (place % 4 == 0) for place in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + same * 4 + bytes(corners) + same * 3
    return _profile(name, "CMYK", {"A2B0": table}, connection="Lab ", kind="prtr")


def _profile(name: str, space: str, tags: dict[str, bytes], connection: str = "XYZ ", kind: str = "mntr") -> bytes:
    text = name.encode() + b"\0"
    description = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {"desc": description, "cprt": b"text" + bytes(4) + b"none\0", "wtpt": _xyz(*D50), **tags}
    start = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        padded = content + bytes(-len(content) % 4)
        table += tag.encode() + struct.pack(">II", start + len(data), len(content))
        data += padded
    head = struct.pack(">I4sI4s4s4s", start + len(data), bytes(4), 0x02400000, kind.encode(), space.encode(),
                       connection.encode())  # fmt: skip
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _xyz(*D50)[8:]
    return head.ljust(128, b"\0") + table + data


def _xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * value) for value in values))


def _gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * value))


def _srgb_curve() -> bytes:
    levels = (place / 1023 for place in range(1024))
    linear = (level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels)
    return b"curv" + bytes(4) + struct.pack(">I1024H", 1024, *(round(65535 * value) for value in linear))
