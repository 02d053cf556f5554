"""A folder of encoded samples: the output of a precompute task and the input of a train task. No torch.

`encoded.json` states from what the folder was encoded and which files belong to it; it is marked as incomplete until
all samples are encoded. The encodings are in `encodings/<encoder>/`, one file per encoder and content.
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
from diffsynth_core.progress import pluralize

MANIFEST = "encoded.json"
"""Name of the manifest."""
FORMAT = 1
"""Incremented when older folders can no longer be read."""
MAX_MANIFEST_BYTES = 4 * 2**30
"""Maximum size of `encoded.json`; a sample takes about 200 bytes."""
ENCODE_AGAIN = "encode the samples again"
"""Hint for damaged folders."""


@dataclass(frozen=True)
class Origin:
    """Everything that determines the content of a folder of encoded samples.

    Attributes:
        kind: title of the variant.
        encoders: name -> version and the extra inputs that affect its output.
        sizes: parameters that determine the size and length of samples.
        components: component -> file -> sha256.
        shapes: component -> shapes of the tensors that must match the denoiser.
        dataset_fingerprint: as in a run.
        contents: sha256 over the names of all encodings but those of the empty caption.
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
        """sha256 over all attributes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class EncodedFile:
    """One encoding of a sample: its name in the folder of its encoder, and its size."""

    key: str
    bytes: int


@dataclass(frozen=True)
class EncodedSamples:
    """The content of such a folder; without `samples` it is incomplete.

    Attributes:
        files: encoder -> encodings, for each sample: one for each of its captions where the encoder reads them. Only
            row, file name and sizes of a sample are stored, not its captions.
        with_empty_caption: the last encoding of each sample, where the encoder reads captions, is that of the empty
            one (`Sample.choices`).
    """

    folder: Path
    origin: Origin
    samples: tuple[Sample, ...] = ()
    files: tuple[Mapping[str, tuple[EncodedFile, ...]], ...] = ()
    with_empty_caption: bool = False

    @property
    def complete(self) -> bool:
        """Whether all samples are encoded."""
        return bool(self.samples)

    def cache(self, encoder: str) -> EncodingCache:
        """Return the cache with the encodings of one encoder."""
        return EncodingCache(encodings_folder(self.folder, encoder))

    def paths(self) -> Iterator[tuple[Path, int]]:
        """Yield the files that belong to it, and their sizes in bytes."""
        caches = {encoder: self.cache(encoder) for encoder in self.origin.encoders}
        for files in self.files:
            for encoder, choices in files.items():
                yield from ((caches[encoder].path(file.key), file.bytes) for file in choices)


@dataclass(frozen=True)
class _Entry:
    """One sample in the file; see `_as_plain`.

    Attributes:
        files: one for each encoder.
        others: encoder -> those of further captions, and of the empty one.
    """

    row: int
    file: str
    shape: tuple[int, int, int]
    files: tuple[tuple[str, int], ...]
    shown: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    sampling: Sampling | None = None
    others: dict[str, list[tuple[str, int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Manifest:
    """The file; see `write_encoded`."""

    format: int
    complete: bool
    fingerprint: str
    origin: Origin
    samples: tuple[_Entry, ...]
    with_empty_caption: bool = False


def encodings_folder(folder: Path, encoder: str) -> Path:
    """Return the folder of an encoder's encodings."""
    return folder / "encodings" / encoder


def holds_encoded_samples(folder: Path) -> bool:
    """Return whether a precompute task wrote into this folder, complete or not."""
    return (folder / MANIFEST).is_file()


def write_encoded(encoded: EncodedSamples) -> None:
    """Write `encoded.json` atomically."""
    content = {
        "format": FORMAT,
        "complete": encoded.complete,
        "fingerprint": encoded.origin.fingerprint,
        "origin": asdict(encoded.origin),
        **({"with_empty_caption": True} if encoded.with_empty_caption else {}),
        "samples": [_as_plain(sample, files) for sample, files in zip(encoded.samples, encoded.files, strict=True)],
    }
    write_text(encoded.folder / MANIFEST, json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


def read_encoded(folder: Path) -> EncodedSamples:
    """Return the encoded samples listed in a folder's `encoded.json`, without accessing other files.

    Raises:
        DiffSynthError: if the file is damaged or of another format.
    """
    path = folder / MANIFEST
    content = read_json(path, dict[str, Any], ENCODE_AGAIN, MAX_MANIFEST_BYTES)
    if content.get("format") != FORMAT:
        found = (
            f"format {truncate(json.dumps(content['format']))}" if content.get("format") is not None else "no `format`"
        )
        raise DiffSynthError(f"`{path}` has {found}, but this version reads format {FORMAT}", ENCODE_AGAIN)
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
        raise DiffSynthError(f"`{path}` row {wrong}: expected {pluralize(len(encoders), 'file')}", ENCODE_AGAIN)
    samples = tuple(_sample(entry, manifest.with_empty_caption) for entry in manifest.samples)
    files = tuple(
        {
            encoder: tuple(EncodedFile(*one) for one in (file, *entry.others.get(encoder, ())))
            for encoder, file in zip(encoders, entry.files, strict=True)
        }
        for entry in manifest.samples
    )
    return EncodedSamples(folder, origin, samples, files, manifest.with_empty_caption)


def unexpected_files(folder: Path, known: set[Path]) -> list[str]:
    """Return files in a folder that do not belong to it, sorted; hidden ones, such as unfinished ones, are ignored."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path not in known and not path.name.startswith(".") and not path.is_dir()
    )


def _as_plain(sample: Sample, files: Mapping[str, tuple[EncodedFile, ...]]) -> dict[str, Any]:
    plain: dict[str, Any] = {"row": sample.row, "file": str(sample.target.path), "shape": sample.target.shape}
    if sample.conditions:
        plain["shown"] = {name: [shown.shape for shown in images] for name, images in sample.conditions.items()}
    if sample.sampling:
        plain["sampling"] = asdict(sample.sampling)
    others = {name: [[file.key, file.bytes] for file in further] for name, (_, *further) in files.items() if further}
    if others:
        plain["others"] = others
    return plain | {"files": [[first.key, first.bytes] for first, *_ in files.values()]}


def _sample(entry: _Entry, with_empty_caption: bool) -> Sample:
    path = Path(entry.file)
    shown = {name: tuple(_crop(path, shape) for shape in shapes) for name, shapes in entry.shown.items()}
    others = ("",) * (max(map(len, entry.others.values()), default=0) - with_empty_caption)
    target = _crop(path, entry.shape)
    return Sample(entry.row, "", target, shown, entry.sampling, others, with_empty_caption=with_empty_caption)


def _crop(path: Path, shape: tuple[int, int, int]) -> MediaCrop:
    frames, height, width = shape
    return MediaCrop(path, height, width, video=frames > 1, frames=frames)
