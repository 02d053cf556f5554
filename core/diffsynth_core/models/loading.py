"""From component files to a module in memory: built without memory, checked by shape, filled tensor by tensor."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from diffsynth_core.adapters.float8 import FLOAT8, LARGEST, Float8Linear, fits, float8_layers
from diffsynth_core.errors import DiffSynthError, Problem, list_names, raise_if_any
from diffsynth_core.models.bases import part_of, shapes_in
from diffsynth_core.models.family import Family
from diffsynth_core.models.spec import ComponentFiles
from diffsynth_core.progress import Reporter, format_bytes, pluralize
from diffsynth_core.weights.tensors import dequantize, iterate_weights


def module_shapes(files: ComponentFiles) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a component's files, by their names in our module; what has none is left out."""
    return shapes_in(part_of(files), files.layout)


def build_empty(family: Family, files: ComponentFiles) -> nn.Module:
    """The component's module with parameters on the meta device and buffers (rotary tables and the like) computed.

    Raises:
        DiffSynthError: when the configuration does not tell or cannot be built.
    """
    from accelerate import init_empty_weights

    config = family.config_of(files, module_shapes(files)) | dict(files.settings)
    with init_empty_weights(include_buffers=False):
        module = family.build(files.component, config)
    tie(module)
    return module.eval().requires_grad_(False)


def shape_problems(family: Family, files: ComponentFiles) -> list[Problem]:
    """How the tensors of the files differ from those the component's configuration asks for. Reads headers only."""
    try:
        return _compare(files, build_empty(family, files))
    except DiffSynthError as error:
        return list(error.problems)
    except Exception as error:
        source = f"`{files.config_path}`" if files.config_path else "its tensor shapes"
        reason = " ".join(str(error).split()) or type(error).__name__
        return [
            Problem(
                f"{files.component} from `{files.origin}` cannot be built from {source}: {reason}",
                "put the config.json of these files next to them",
            )
        ]


def _compare(files: ComponentFiles, module: nn.Module) -> list[Problem]:
    """Missing tensors, surplus ones and misshapen ones; a tied tensor may be there or not."""
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
        what = f"is missing {len(missing)} tensors that {source} requires: {list_names(missing)}"
        problems.append(Problem(f"{where} {what}", "pass all files of the component"))
    if surplus:
        what = f"has {len(surplus)} tensors that {source} does not define: {list_names(sorted(surplus))}"
        problems.append(Problem(f"{where} {what}", "pass only the files of one component"))
    placed = {name: original for name, original in names.items() if original not in surplus}
    wrong = list(dict.fromkeys(placed[name] for name in sorted(placed) if expected[name] != shapes[name]))
    if wrong:
        first = wrong[0]
        what = (
            f"the shapes of {len(wrong)} tensors differ from those that {source} requires; "
            f"`{first}` is {list(found[first].shape)}, expected {list(files.layout.names.fuse_shape(first, expected))}"
        )
        problems.append(Problem(f"{where}: {what}", "check that config.json belongs to these files"))
    return problems


WeightChange = Callable[[str, Tensor, torch.dtype], Tensor]
"""(name in our module, tensor as in the file, dtype it is wanted in) -> the tensor to load in its place."""


def load_component(
    family: Family,
    files: ComponentFiles,
    dtype: torch.dtype,
    device: torch.device,
    reporter: Reporter,
    change: WeightChange | None = None,
    float32: Collection[str] = (),
) -> nn.Module:
    """A component with its weights in `dtype`, those named in `float32` in that, on `device`, frozen and in eval mode.

    Each tensor is read, converted and moved by itself, so that no second copy of the model is ever in memory. Buffers
    keep their own dtype: a rotary table rounded to bfloat16 turns positions by up to half a radian. So do the
    weights that diffusers keeps in float32. Of files marked `float8` the weights of `float8_layers` are stored in 8-bit
    floats and computed with in `dtype`; those that reach beyond their range are not, which is told. Weights that the
    files store in 8-bit floats with a scale for each row, or for all, are kept as they are there; others with a scale
    are multiplied by it first.

    Raises:
        FaultsFound: when names or shapes do not fit the configuration.
    """
    module = build_empty(family, files)
    raise_if_any(_compare(files, module))
    narrow = float8_weights(files, module)
    buffers = {name for name, _ in module.named_buffers()}
    part = part_of(files)
    label = f"Loading {files.component} ({format_bytes(part.nbytes)})"
    with reporter.task(label, len(part.tensors), "tensors") as task:
        for key, stored, scale in iterate_weights(part):
            if scale is not None and not change and _keeps_scale(files, narrow, key, stored, scale):
                for name, (value, rows) in _cut_stored(files, key, stored, scale).items():
                    _store(module, name, value, dtype, device, rows)
                task.advance()
                continue
            tensor = stored if scale is None else dequantize(stored, scale)
            for name, value in files.layout.names.split(key, tensor).items():
                wide = name in float32 or stays_float32(module, name)
                kept = torch.float32 if wide else dtype
                changed = change(name, value, kept) if change else value
                if name in narrow and fits(changed):
                    _store(module, name, changed, dtype, device)
                else:
                    # A copy: a view of the file's memory would tie the model to a file that may be overwritten.
                    placed_dtype = None if name in buffers else kept
                    place(module, name, changed.to(device=device, dtype=placed_dtype, copy=True))
            task.advance()
    beyond = sorted(narrow & {name for name, _ in module.named_parameters()})
    if beyond:
        reporter.info(
            f"{files.component}: {pluralize(len(beyond), 'weight')} outside ±{LARGEST:g}, the fp8 range, "
            f"kept in {str(dtype).removeprefix('torch.')}: {list_names(beyond)}"
        )
    tie(module)
    return module.to(device)


def _keeps_scale(files: ComponentFiles, narrow: Collection[str], key: str, stored: Tensor, scale: Tensor) -> bool:
    """Whether a weight of the files is kept in the 8-bit floats that it is stored in: what has one scale a row, and
    becomes whole weights that are to be kept so."""
    names = files.layout.names.to_targets(key) or ()
    return stored.dtype == FLOAT8 and scale.shape[1] == 1 and bool(names) and set(names) <= set(narrow)


def _cut_stored(files: ComponentFiles, key: str, stored: Tensor, scale: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """A stored weight of the files as those of our module, each with the float32 scales of its rows, `[out, 1]`."""
    of_rows = scale.repeat_interleave(len(stored) // len(scale), 0)
    scales = files.layout.names.split(key, of_rows)
    pieces = files.layout.names.split(key, stored.view(torch.uint8))  # few operations know 8-bit floats
    return {name: (piece.view(FLOAT8), scales[name]) for name, piece in pieces.items()}


def store_in_float8(module: nn.Module, dtype: torch.dtype) -> None:
    """Have an empty module store those of its weights in 8-bit floats that can be, and compute with them in `dtype`."""
    for layer in float8_layers(module):
        name = f"{layer}.weight"
        if not stays_float32(module, name):
            _store(module, name, module.get_parameter(name), dtype, torch.device("meta"))


def float8_weights(files: ComponentFiles, module: nn.Module) -> frozenset[str]:
    """Names of the weights of an empty module that are to be stored in 8-bit floats."""
    if not files.float8:
        return frozenset()
    weights = (f"{layer}.weight" for layer in float8_layers(module))
    return frozenset(name for name in weights if not stays_float32(module, name))


def tie(module: nn.Module) -> None:
    """Make tensors one again that are one by the configuration; moving them to a device or filling them parts them."""
    if hasattr(module, "tie_weights"):
        module.tie_weights()  # type: ignore[operator]


def stays_float32(module: nn.Module, name: str) -> bool:
    """Whether diffusers loads a weight in float32 whatever the dtype of the model."""
    from diffusers.models.modeling_utils import ModelMixin

    # Private, but the one place where diffusers says it: `tests/unit/test_private_names.py`.
    kept = module._keep_in_fp32_modules if isinstance(module, ModelMixin) else None
    return any(part in name.split(".") for part in kept or ())


def place(module: nn.Module, name: str, value: Tensor, requires_grad: bool = False) -> None:
    """Put a tensor into a module as its parameter or buffer of that name."""
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
    """Put a layer that stores this weight in 8-bit floats in the place of the linear layer that it belongs to."""
    layer_name = name.removesuffix(".weight")
    layer = module.get_submodule(layer_name)
    assert isinstance(layer, nn.Linear)
    rows = None if scale is None else scale.to(device, copy=True)
    module.set_submodule(layer_name, Float8Linear(layer, value.to(device), dtype, rows))


def stored_dtypes(files: ComponentFiles) -> dict[str, str]:
    """The dtype of each tensor in a component's files, in safetensors' words, by name in our module.

    8-bit floats are told as bfloat16: most of what training changes in a weight would be rounded away in them.
    """
    dtypes: dict[str, str] = {}
    for name, tensor in part_of(files).tensors.items():
        told = "BF16" if tensor.dtype.startswith("F8_") else tensor.dtype
        dtypes |= dict.fromkeys(files.layout.names.to_targets(name) or (), told)
    return dtypes
