"""Reading files ahead of their use, while something else computes."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

from diffsynth_core.planning.memory.host_memory import available_bytes

CHUNK_BYTES = 16 * 2**20


class ReadAhead:
    """Reads files in a thread and keeps nothing: the system keeps them in free memory for who reads them next.

    At the end of the block it stops, wherever it is.
    """

    def __init__(self) -> None:
        self._pool, self._ended = ThreadPoolExecutor(1), Event()

    def begin(self, paths: Iterable[Path]) -> None:
        """Read files after those of earlier calls, unless they are larger than the memory that is available then."""
        self._pool.submit(self._read, tuple(paths))

    def _read(self, paths: tuple[Path, ...]) -> None:
        buffer = bytearray(CHUNK_BYTES)
        with suppress(OSError):  # whoever needs the file tells what is wrong with it
            if sum(path.stat().st_size for path in paths) > available_bytes():
                return
            for path in paths:
                with path.open("rb", buffering=0) as stream:
                    while not self._ended.is_set() and stream.readinto(buffer):
                        pass

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._pool.shutdown(cancel_futures=True)
