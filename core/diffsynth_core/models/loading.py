"""Loading components: the module is built on the meta device, checked by shape, and filled tensor by tensor."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from diffsynth_core.adapters.float8 import FLOAT8, LARGEST, Float8Linear, fits, float8_layers
from diffsynth_core.errors import DiffSynthError, Problem, list_names, raise_if_any
from diffsynth_core.models.bases import part_of, shapes_in
from diffsynth_core.models.family import Family
from diffsynth_core.models.spec import ComponentFacts, ComponentFiles
from diffsynth_core.progress import Reporter, format_bytes, pluralize
from diffsynth_core.weights.tensors import dequantize, iterate_weights


def module_shapes(files: ComponentFiles) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a component's files by module key, without tensors that the module lacks."""
    return shapes_in(part_of(files), files.layout)


def build_empty(family: Family, files: ComponentFiles) -> nn.Module:
    """Build a component's module with parameters on the meta device and computed buffers (such as rotary tables).

    Raises:
        DiffSynthError: if the configuration is unknown or cannot be built.
    """
    from accelerate import init_empty_weights

    config = family.config_of(files, module_shapes(files)) | dict(files.settings)
    with init_empty_weights(include_buffers=False):
        module = family.build(files.component, config)
    tie(module)
    return module.eval().requires_grad_(False)


def shape_problems(family: Family, files: ComponentFiles) -> list[Problem]:
    """Return differences between the tensors of the files and those of the configuration. Reads headers only."""
    try:
        return _compare(files, build_empty(family, files))
    except DiffSynthError as error:
        return list(error.problems)
    except Exception as error:
        where = f"{files.component} from `{files.origin}`"
        if files.config_path:
            reason = " ".join(str(error).split()) or type(error).__name__
            what = f"{where} cannot be built from `{files.config_path}`: {reason}"
        else:
            what = f"{where}: its tensor shapes match no known configuration"
        return [Problem(what, "put the config.json of these files next to them")]


def _compare(files: ComponentFiles, module: nn.Module) -> list[Problem]:
    """Return missing, unexpected and misshapen tensors; a tied tensor is optional."""
    found = part_of(files).tensors
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    required = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    shapes: dict[str, tuple[int, ...]] = {}
    names: dict[str, str] = {}
    surplus = set()
    for original, tensor in found.items():
        cut = files.layout.names.split_shape(original, tensor.shape)
        shapes |= cut
        names |= dict.fromkeys(cut, original)
        if files.layout.names.to_targets(original) is None or not cut.keys() <= expected.keys():
            surplus.add(original)
    source = f"`{files.config_path}`" if files.config_path else "the config inferred from its shapes"
    where = f"{files.component} from `{files.origin}`"
    problems = []
    missing = sorted((expected.keys() & required) - names.keys())
    if missing:
        what = f"is missing {pluralize(len(missing), 'tensor')} that {source} requires: {list_names(missing)}"
        problems.append(Problem(f"{where} {what}", "pass all files of the component"))
    if surplus:
        what = f"has {pluralize(len(surplus), 'tensor')} that {source} does not define: {list_names(sorted(surplus))}"
        problems.append(Problem(f"{where} {what}", "pass only the files of one component"))
    placed = {name: original for name, original in names.items() if original not in surplus}
    wrong = list(dict.fromkeys(placed[name] for name in sorted(placed) if expected[name] != shapes[name]))
    if wrong:
        first = wrong[0]
        what = (
            f"has {pluralize(len(wrong), 'tensor')} of another shape than {source} requires: "
            f"`{first}` is {list(found[first].shape)}, expected {list(files.layout.names.fuse_shape(first, expected))}"
        )
        problems.append(Problem(f"{where} {what}", "check that config.json belongs to these files"))
    return problems


WeightChange = Callable[[str, Tensor, torch.dtype], Tensor]
"""(module key, tensor of the file, target dtype) -> the tensor to load instead."""


def load_component(
    family: Family,
    files: ComponentFiles,
    dtype: torch.dtype,
    device: torch.device,
    reporter: Reporter,
    change: WeightChange | None = None,
    float32: Collection[str] = (),
) -> nn.Module:
    """Load a component, frozen and in eval mode.

    Each tensor is read, converted and moved separately, so that there is never a second copy of the model in memory.
    Buffers keep their own dtype, because a rotary table rounded to bfloat16 is off by up to half a radian; so do
    weights in the family's `fp32_modules`. For files with `float8`, the weights of `float8_layers` are stored in
    8-bit floats, except for those outside the range, which is reported. Weights that the files store in 8-bit floats
    with a scale per row or per tensor keep both; those with other scales are dequantized first.

    Args:
        dtype: dtype of the weights, and of the computation with 8-bit weights.
        change: applied to each tensor before it is loaded.
        float32: module keys of weights to load in float32.

    Raises:
        FaultsFound: if names or shapes do not match the configuration.
    """
    module = build_empty(family, files)
    raise_if_any(_compare(files, module))
    facts = family.facts.component(files.component)
    in_float8 = float8_weights(family, files, module)
    buffers = {name for name, _ in module.named_buffers()}
    part = part_of(files)
    label = f"Loading {files.component} ({format_bytes(part.nbytes)})"
    with reporter.task(label, len(part.tensors), "tensors") as task:
        for key, stored, scale in iterate_weights(part):
            if scale is not None and not change and _keeps_scale(files, in_float8, key, stored, scale):
                for name, (value, rows) in _cut_stored(files, key, stored, scale).items():
                    _store(module, name, value, dtype, device, rows)
                task.advance()
                continue
            tensor = stored if scale is None else dequantize(stored, scale)
            for name, value in files.layout.names.split(key, tensor).items():
                wide = name in float32 or facts.stays_float32(name)
                kept = torch.float32 if wide else dtype
                changed = change(name, value, kept) if change else value
                if name in in_float8 and fits(changed):
                    _store(module, name, changed, dtype, device)
                else:
                    # A copy: a view of the file's memory would tie the model to a file that may be overwritten.
                    placed_dtype = None if name in buffers else kept
                    place(module, name, changed.to(device=device, dtype=placed_dtype, copy=True))
            task.advance()
    beyond = sorted(in_float8 & {name for name, _ in module.named_parameters()})
    if beyond:
        reporter.info(
            f"{files.component}: {pluralize(len(beyond), 'weight')} outside ±{LARGEST:g}, the fp8 range, "
            f"kept in {str(dtype).removeprefix('torch.')}: {list_names(beyond)}"
        )
    tie(module)
    return module.to(device)


def _keeps_scale(files: ComponentFiles, in_float8: Collection[str], key: str, stored: Tensor, scale: Tensor) -> bool:
    """Return whether a weight of the files stays in the 8-bit floats in which it is stored.

    That requires one scale per row, and that it consists of complete weights for 8-bit storage.
    """
    names = files.layout.names.to_targets(key) or ()
    return stored.dtype == FLOAT8 and scale.shape[1] == 1 and bool(names) and set(names) <= set(in_float8)


def _cut_stored(files: ComponentFiles, key: str, stored: Tensor, scale: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Split a stored weight of the files into those of the module, with their float32 scales per row, `[out, 1]`."""
    of_rows = scale.repeat_interleave(len(stored) // len(scale), 0)
    scales = files.layout.names.split(key, of_rows)
    pieces = files.layout.names.split(key, stored.view(torch.uint8))  # few operations support 8-bit floats
    return {name: (piece.view(FLOAT8), scales[name]) for name, piece in pieces.items()}


def store_in_float8(facts: ComponentFacts, module: nn.Module, dtype: torch.dtype) -> None:
    """Store the suitable weights of an empty module in 8-bit floats, to be computed with in `dtype`."""
    for layer in float8_layers(module):
        name = f"{layer}.weight"
        if not facts.stays_float32(name):
            _store(module, name, module.get_parameter(name), dtype, torch.device("meta"))


def float8_weights(family: Family, files: ComponentFiles, module: nn.Module) -> frozenset[str]:
    """Return the names of the weights of an empty module to store in 8-bit floats."""
    if not files.float8:
        return frozenset()
    facts = family.facts.component(files.component)
    weights = (f"{layer}.weight" for layer in float8_layers(module))
    return frozenset(name for name in weights if not facts.stays_float32(name))


def tie(module: nn.Module) -> None:
    """Tie shared tensors again: filling or moving them separates them."""
    if hasattr(module, "tie_weights"):
        module.tie_weights()  # type: ignore[operator]


def place(module: nn.Module, name: str, value: Tensor, requires_grad: bool = False) -> None:
    """Set a tensor of a module, as its parameter or buffer."""
    parent_name, _, leaf = name.rpartition(".")
    parent = module.get_submodule(parent_name)
    is_parameter = isinstance(getattr(parent, leaf), nn.Parameter)
    setattr(parent, leaf, nn.Parameter(value, requires_grad) if is_parameter else value)


def _store(
    module: nn.Module,
    name: str,
    value: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    scale: Tensor | None = None,
) -> None:
    """Replace the linear layer of a weight with one that stores it in 8-bit floats."""
    layer_name = name.removesuffix(".weight")
    layer = module.get_submodule(layer_name)
    assert isinstance(layer, nn.Linear)
    rows = None if scale is None else scale.to(device, copy=True)
    module.set_submodule(layer_name, Float8Linear(layer, value.to(device), dtype, rows))


def stored_dtypes(files: ComponentFiles) -> dict[str, str]:
    """Return the safetensors dtype of each tensor in a component's files, by module key.

    8-bit floats are returned as bfloat16: they would round away most of what training changes in a weight.
    """
    dtypes: dict[str, str] = {}
    for name, tensor in part_of(files).tensors.items():
        dtype_name = "BF16" if tensor.dtype.startswith("F8_") else tensor.dtype
        dtypes |= dict.fromkeys(files.layout.names.to_targets(name) or (), dtype_name)
    return dtypes
