"""A folder of encoded samples: what the first half of split training writes and the second half trains on. No torch.

`encoded.json` says of what the folder was made and which files belong to it; while samples are being encoded it says
that it is not complete. The encodings lie below `encodings/<encoder>/`, one file per encoder and content.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffsynth_core.data.cache import EncodingCache
from diffsynth_core.data.media import MediaCrop
from diffsynth_core.data.samples import Sample
from diffsynth_core.data.sampling import Sampling
from diffsynth_core.errors import DiffSynthError, truncate
from diffsynth_core.files import write_text
from diffsynth_core.json_files import WrongType, as_type, read_json

MANIFEST = "encoded.json"
FORMAT = 1
"""Goes up when older folders can no longer be read."""
MAX_MANIFEST_BYTES = 4 * 2**30
"""Largest `encoded.json` that is read; a sample takes some 200 bytes."""
ENCODE_AGAIN = "encode the samples again"


@dataclass(frozen=True)
class Origin:
    """All that a folder of encoded samples was made of.

    `kind`: the kind of model, in words. `encoders`: name -> its version and the extra inputs that changed what it made.
    `sizes`: parameters that decide at which size and length samples are encoded. `components`: component -> file ->
    sha256. `shapes`: component -> shapes of those of its tensors that say what it fits.
    `dataset_fingerprint`: as that of a run. `contents`: sha256 over the names of all encodings.
    """

    objective: str
    family: str
    kind: str
    encoders: dict[str, list[Any]]
    extra_inputs: list[str]
    sizes: dict[str, Any]
    precision: str
    components: dict[str, dict[str, str]]
    shapes: dict[str, dict[str, list[int]]]
    dataset_fingerprint: str
    contents: str

    @property
    def fingerprint(self) -> str:
        """sha256 over all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class EncodedFile:
    """One encoding of a sample: its name in the folder of its encoder, and its size."""

    key: str
    bytes: int


@dataclass(frozen=True)
class EncodedSamples:
    """The contents of such a folder; without `samples` it is not complete.

    `files`: of each sample, by encoder. Of a sample only its row, file name and sizes are kept, not its caption.
    """

    folder: Path
    origin: Origin
    samples: tuple[Sample, ...] = ()
    files: tuple[Mapping[str, EncodedFile], ...] = ()

    @property
    def complete(self) -> bool:
        return bool(self.samples)

    def cache(self, encoder: str) -> EncodingCache:
        """Where the encodings of one encoder lie."""
        return EncodingCache(encodings_folder(self.folder, encoder))

    def paths(self) -> Iterator[tuple[Path, int]]:
        """The files that belong to it, and how many bytes they have."""
        caches = {encoder: self.cache(encoder) for encoder in self.origin.encoders}
        for files in self.files:
            for encoder, file in files.items():
                yield caches[encoder].path(file.key), file.bytes


@dataclass(frozen=True)
class _Entry:
    """One sample in the file; see `_as_plain`."""

    row: int
    file: str
    shape: tuple[int, int, int]
    files: tuple[tuple[str, int], ...]
    shown: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    sampling: Sampling | None = None


@dataclass(frozen=True)
class _Manifest:
    """The file; see `write_encoded`."""

    format: int
    complete: bool
    fingerprint: str
    origin: Origin
    samples: tuple[_Entry, ...]


def encodings_folder(folder: Path, encoder: str) -> Path:
    return folder / "encodings" / encoder


def holds_encoded_samples(folder: Path) -> bool:
    """Whether a first half wrote into this folder, complete or not."""
    return (folder / MANIFEST).is_file()


def write_encoded(encoded: EncodedSamples) -> None:
    """Write `encoded.json`, whole or not at all."""
    content = {
        "format": FORMAT,
        "complete": encoded.complete,
        "fingerprint": encoded.origin.fingerprint,
        "origin": asdict(encoded.origin),
        "samples": [_as_plain(sample, files) for sample, files in zip(encoded.samples, encoded.files, strict=True)],
    }
    write_text(encoded.folder / MANIFEST, json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


def read_encoded(folder: Path) -> EncodedSamples:
    """The encoded samples in a folder, as its `encoded.json` names them; looks at no other file.

    Raises:
        DiffSynthError: when the file is damaged or of another format.
    """
    path = folder / MANIFEST
    content = read_json(path, dict[str, Any], ENCODE_AGAIN, MAX_MANIFEST_BYTES)
    if content.get("format") != FORMAT:
        found = truncate(json.dumps(content.get("format")))
        raise DiffSynthError(f"`{path}` has format {found}, but this version reads {FORMAT}", ENCODE_AGAIN)
    try:
        manifest = as_type(content, _Manifest)
    except WrongType as error:
        raise DiffSynthError(f"`{path}`: {error}", ENCODE_AGAIN) from error
    origin = manifest.origin
    if origin.fingerprint != manifest.fingerprint:
        raise DiffSynthError(f"`{path}` was edited: fingerprint mismatch", ENCODE_AGAIN)
    encoders = tuple(origin.encoders)
    wrong = next((entry.row for entry in manifest.samples if len(entry.files) != len(encoders)), None)
    if wrong is not None:
        raise DiffSynthError(f"`{path}` row {wrong}: expected {len(encoders)} files", ENCODE_AGAIN)
    samples = tuple(_sample(entry) for entry in manifest.samples)
    files = tuple(
        {encoder: EncodedFile(*file) for encoder, file in zip(encoders, entry.files, strict=True)}
        for entry in manifest.samples
    )
    return EncodedSamples(folder, origin, samples, files)


def unexpected_files(folder: Path, known: set[Path]) -> list[str]:
    """Files in a folder, by name, that do not belong to it; hidden ones, such as those being written, do not count."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path not in known and not path.name.startswith(".") and not path.is_dir()
    )


def _as_plain(sample: Sample, files: Mapping[str, EncodedFile]) -> dict[str, Any]:
    plain: dict[str, Any] = {"row": sample.row, "file": str(sample.target.path), "shape": sample.target.shape}
    if sample.conditions:
        plain["shown"] = {name: [shown.shape for shown in images] for name, images in sample.conditions.items()}
    if sample.sampling:
        plain["sampling"] = asdict(sample.sampling)
    return plain | {"files": [[file.key, file.bytes] for file in files.values()]}


def _sample(entry: _Entry) -> Sample:
    path = Path(entry.file)
    shown = {name: tuple(_crop(path, shape) for shape in shapes) for name, shapes in entry.shown.items()}
    return Sample(entry.row, "", _crop(path, entry.shape), shown, entry.sampling)


def _crop(path: Path, shape: tuple[int, int, int]) -> MediaCrop:
    frames, height, width = shape
    return MediaCrop(path, height, width, video=frames > 1, frames=frames)
