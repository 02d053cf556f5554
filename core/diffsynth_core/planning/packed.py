"""Where a run keeps weights as their store packs them."""

import os
from contextlib import AbstractContextManager, nullcontext

from diffsynth_core.data.cache import EncodingCache
from diffsynth_core.files import disk_id
from diffsynth_core.models.packed_weights import PackedWeights
from diffsynth_core.planning.disk import disk_use, packed_bytes
from diffsynth_core.planning.memory_config import memory_config
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.planning.sizes import find_workload
from diffsynth_core.progress import Reporter


def packed_weights(plan: RunPlan, component: str, reporter: Reporter) -> AbstractContextManager[PackedWeights | None]:
    """Return the packed weights of a component, in the cache folder; None for one of which none are kept.

    They are written by one process of each machine, as long as that leaves room for all else that the run writes.
    """
    files, identity = plan.model.components[component], plan.encodings.identities.get(component)
    if identity is None or component not in packed_bytes(plan):
        return nullcontext()
    run = find_workload(plan)
    use = disk_use(plan, memory_config(plan, run.largest), run.encoded)
    cache, output = plan.output.cache, plan.parameters.output_path
    return PackedWeights(
        EncodingCache(cache / "weights" / plan.model.facts.name / component),
        reporter,
        writes=os.environ.get("LOCAL_RANK", "0") == "0",
        reserved=use.cache + (use.written if disk_id(output) == disk_id(cache) else 0),
        component=component,
        prefix=files.prefix,
        files=sorted(identity.values()),
        storage=files.storage.partition("/")[0],
    )
