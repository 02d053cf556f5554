"""What a rehearsal proves of the files that it wrote."""

from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.models.loading import module_shapes
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import pluralize
from diffsynth_core.training.checkpointing import removed_prefix
from diffsynth_core.training.loop import RunResult
from diffsynth_core.weights.headers import read_headers
from diffsynth_core.weights.lora_files import read_lora_file


def prove_checkpoint(plan: RunPlan, result: RunResult) -> list[str]:
    """Read the last checkpoint and verify its keys and shapes; return one line per part."""
    path = result.folder / result.record.checkpoints[-1].file
    tensors = read_headers([path])
    proofs = []
    full: dict[str, tuple[int, ...]] = {}
    for component in (*plan.training.full, *plan.training.parts):
        files = plan.model.components[component]
        own = module_shapes(files)
        kept = plan.training.weights(component, files.layout, own)
        shapes = files.layout.checkpoint_shapes({name: own[name] for name in kept})
        weights = {f"pipe.{component}.{name}": shape for name, shape in shapes.items()}
        full |= {name.removeprefix(removed_prefix(plan.parameters)): shape for name, shape in weights.items()}
        proofs.append(f"all {len(weights)} tensors of {component} are in the checkpoint with the right shapes")
    wrong = [name for name, shape in full.items() if name not in tensors or tensors[name].shape != shape]
    if wrong:
        raise DiffSynthError(
            f"`{path}`: {pluralize(len(wrong), 'tensor')} of the run missing or of another shape: {list_names(wrong)}"
        )
    lora = plan.training.lora_component
    if lora:
        files = plan.model.components[lora]
        shapes = files.layout.public_shapes(module_shapes(files))
        modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
        ranks = read_lora_file(path, modules, plan.model.facts.component(lora).lora_naming, besides=full).ranks
        if ranks.keys() != set(plan.training.lora_modules):
            raise DiffSynthError(
                f"`{path}` contains a LoRA of {pluralize(len(ranks), 'module')}, expected {len(plan.training.lora_modules)}"
            )
        keys = len(tensors) - len(full)
        proofs.append(
            f"read the LoRA back: each of its {pluralize(keys, 'key')} matches one of {pluralize(len(ranks), 'module')} of {lora}"
        )
    return proofs
