"""Folders of runs that were not run: a record, and checkpoints from elsewhere."""

from pathlib import Path

from diffsynth_core.checkpoints.run_folder import CheckpointEntry, RunRecord
from diffsynth_core.config.parameters import DEFAULTS
from tests.conftest import ENTRIES


def record_run(folder: Path, dataset: Path, family: str = "qwen-image", **changes: object) -> Path:
    """Write the record of a run, with the files next to the folder as its checkpoints.

    Its model is the tiny Qwen-Image, unless `changes` name the files of another one.
    """
    parameters = DEFAULTS | {
        "model_id_with_origin_paths": list(ENTRIES.values()),
        "lora_base_model": "dit",
        "dataset_base_path": str(dataset),
        "height": 64,
        "width": 96,
    }
    folder.mkdir()
    record = RunRecord(
        parameters=parameters | changes,
        family=family,
        seed=0,
        dataset_fingerprint="",
        components={},
        mixed_precision="no",
        micro_batches_per_step=1,
    )
    for path in sorted(folder.parent.glob("*.safetensors")):
        (folder / path.name).write_bytes(path.read_bytes())
        record.add_checkpoint(CheckpointEntry(path.name, 1, 0, "", 0))
    record.save(folder)
    return folder
