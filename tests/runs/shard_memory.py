"""Load and save a model in processes that shard it, and print the peak of their host memory:
`torchrun … -m tests.runs.shard_memory BASE PHOTOGRAPHS OUTPUT`.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from diffsynth_core.config.resolve import resolve
from diffsynth_core.planning.machine.engines import engine_of_environment
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.checkpointing import checkpoint_content, write_checkpoint
from diffsynth_core.training.setup import load_for_steps, make_accelerator, make_optimizer
from diffsynth_core.weights.writing import access_as_written


def anonymous_bytes() -> int:
    """Memory of this process that is no copy of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def peak(found: dict[str, int], name: str) -> Iterator[None]:
    """Note the largest memory within the block under a name."""
    ended, largest = threading.Event(), [0]

    def watch() -> None:
        while not ended.is_set():
            largest[0] = max(largest[0], anonymous_bytes())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        found[name] = largest[0]


def main(base: Path, photographs: Path, output: Path) -> None:
    flags = {"recipe": "qwen-image-full", "dataset_base_path": str(photographs), "device": "cpu",
             "dataset_num_workers": 0, "output_path": str(output)}  # fmt: skip
    engine = engine_of_environment(os.environ)
    world_size = int(os.environ["WORLD_SIZE"])
    plan = make_plan(resolve(flags), SilentReporter(), world_size, base, engine=engine)
    accelerator = make_accelerator(plan)
    found: dict[str, int] = {}
    with peak(found, "loading"):
        plan, model, sharded = load_for_steps(plan, accelerator, SilentReporter(), StopRequest())
    sharded.prepare(model, partial(make_optimizer, plan))
    found["before saving"] = anonymous_bytes()
    with peak(found, "saving"):
        content = checkpoint_content(plan, model, sharded.whole)
        if accelerator.is_main_process:
            output.mkdir()
            write_checkpoint(plan, content, output, "epoch-0", 1, 0)
        else:
            access_as_written(content.tensors, content.dtypes)
    accelerator.wait_for_everyone()
    # Of a parameter that ZeRO-3 has divided, `numel` is 0.
    sizes = [getattr(weight, "ds_numel", weight.numel()) * weight.itemsize for weight in model.parameters()]
    numbers = {"rank": accelerator.process_index, **found, "model": sum(sizes), "largest": max(sizes)}
    Path(f"{output}-{accelerator.process_index}.json").write_text(json.dumps(numbers))
    accelerator.end_training()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
