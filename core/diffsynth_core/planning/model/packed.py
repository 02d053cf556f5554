"""Where a run keeps weights as their store packs them."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from diffsynth_core.checkpoints.run_folder import CHECKPOINT_NAMES
from diffsynth_core.data.cache import EncodingCache
from diffsynth_core.files import disk_id
from diffsynth_core.models.packed_weights import PackedWeights
from diffsynth_core.planning.memory.disk import disk_use, packed_bytes
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.output.states_on_disk import bytes_of_states
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter


def packed_weights(plan: RunPlan, component: str, reporter: Reporter) -> AbstractContextManager[PackedWeights | None]:
    """Return the packed weights of a component, in the cache folder; None for one of which none are kept.

    They are written by one process of each machine, as long as that leaves room for all else that the run writes.
    """
    files = plan.model.components[component]
    if component not in packed_bytes(plan):
        return nullcontext()
    identity = plan.encodings.identities.get(component)
    if identity is None:
        return nullcontext()
    run = find_workload(plan)
    use = disk_use(plan, memory_config(plan, run.largest), run.encoded)
    cache, output = plan.output.cache, plan.parameters.output_path
    to_save = max(0, use.written - bytes_of_states(output) - _bytes_of_checkpoints(output))
    return PackedWeights(
        EncodingCache(cache / "weights" / plan.model.facts.name / component),
        reporter,
        writes=os.environ.get("LOCAL_RANK", "0") == "0",
        reserved=_bytes_to_encode(plan, component, use.cache) + (to_save if disk_id(output) == disk_id(cache) else 0),
        component=component,
        prefix=files.prefix,
        files=sorted(identity.values()),
        storage=files.storage.partition("/")[0],
    )


def _bytes_to_encode(plan: RunPlan, component: str, every: int) -> int:
    """Return the share of the bytes of all encodings that is still to be written when a component is loaded.

    What encodes nothing is loaded after it has been.
    """
    if component not in plan.encodings.components_to_load:
        return 0
    parts = plan.encodings.encoders
    return every * sum(len(part.missing) for part in parts) // max(1, sum(len(part.keys) for part in parts))


def _bytes_of_checkpoints(output: Path) -> int:
    return sum(path.stat().st_size for pattern in CHECKPOINT_NAMES for path in output.glob(pattern))
