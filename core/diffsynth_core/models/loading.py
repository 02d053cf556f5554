"""Loading components: the module is built and prepared on the meta device, and filled tensor by tensor."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from diffsynth_core.adapters.lora import base_layers, start_lora
from diffsynth_core.adapters.stored import PlainFormat, StoredLinear
from diffsynth_core.adapters.swap import BlockSwap
from diffsynth_core.adapters.tensors import Place, place
from diffsynth_core.errors import DiffSynthError, Problem, list_names, raise_if_any
from diffsynth_core.models.bases import part_of, shapes_in
from diffsynth_core.models.family import Family
from diffsynth_core.models.packed_weights import PackedWeights
from diffsynth_core.models.prepare import FROZEN, ComponentSetup, prepare_component
from diffsynth_core.models.spec import ComponentFacts, ComponentFiles, Shapes
from diffsynth_core.models.weight_store import WeightStore, find_store
from diffsynth_core.progress import Reporter, format_bytes, pluralize
from diffsynth_core.weights.tensors import dequantize, iterate_weights


def module_shapes(files: ComponentFiles) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a component's files by module key, without tensors that the module lacks."""
    return shapes_in(part_of(files), files.layout)


def build_empty(family: Family, files: ComponentFiles, shapes: Shapes | None = None) -> nn.Module:
    """Build a component's module with parameters on the meta device and computed buffers (such as rotary tables).

    Args:
        shapes: of its tensors, by module key; None: those of the files.

    Raises:
        DiffSynthError: if the configuration is unknown or cannot be built.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    config = family.config_of(files, module_shapes(files) if shapes is None else shapes) | dict(files.settings)
    # Initialization has no effect on the meta device, but takes half of the time.
    with init_empty_weights(include_buffers=False), no_init_weights():
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
    *,
    change: WeightChange | None = None,
    float32: Collection[str] = (),
    setup: ComponentSetup = FROZEN,
    place: Place = place,
    packed: PackedWeights | None = None,
) -> nn.Module:
    """Load a component in eval mode, prepared for training steps as its setup says.

    The order is the same for all engines: the module is built and prepared on the meta device, then filled. Each tensor
    is read, converted and placed separately, so that there is never a second copy of the model in memory. Buffers keep
    their own dtype, because a rotary table rounded to bfloat16 is off by up to half a radian; so do weights in the
    family's `fp32_modules`. Weights that wait in host memory are filled there. The weight store of the files keeps what
    it can of the weights of its layers, and the rest is reported. Weights that the files store with a scale per row or
    per tensor keep both if the store does; otherwise they are dequantized first.

    Args:
        dtype: dtype of the weights, and of the computation with weights that the store keeps.
        change: applied to each tensor before it is loaded.
        float32: module keys of weights to load in float32.
        place: sets each tensor of the module.
        packed: has weights as the store packed them at an earlier start, and takes those that it packs.

    Raises:
        FaultsFound: if names or shapes do not match the configuration.
    """
    module = build_empty(family, files)
    raise_if_any(_compare(files, module))
    facts = family.facts.component(files.component)
    store = find_store(files.storage)
    buffers = frozenset(name for name, _ in module.named_buffers())
    replaced = swap_layers(facts, module, store, dtype)
    waiting = [[_stored_layer(module, name, dtype) for name in names] for names in setup.swapped]
    prepare_component(family, files.component, module, setup)

    def dtype_of(name: str) -> torch.dtype | None:
        if name in buffers:
            return None
        return torch.float32 if name in float32 or facts.stays_float32(name) else dtype

    filler = _Filler(module, store, replaced, device, place, packed)
    if waiting:
        filler.swap_out(setup.swapped, waiting)
    _fill(filler, files, dtype_of, change, reporter)
    if filler.rejected:
        reporter.info(
            f"{files.component}: {pluralize(len(filler.rejected), 'weight')} {store.rejects}, "
            f"kept in {str(dtype).removeprefix('torch.')}: {list_names(sorted(filler.rejected))}"
        )
    start_lora(module, setup.seed, setup.public_keys, device, place)
    tie(module)
    return module.to(device)


def _fill(
    filler: "_Filler",
    files: ComponentFiles,
    dtype_of: Callable[[str], torch.dtype | None],
    change: WeightChange | None,
    reporter: Reporter,
) -> None:
    part, names = part_of(files), files.layout.names

    def filled(key: str) -> bool:
        if not filler.fill_packed(names.to_targets(key) or ()):
            return False
        task.advance()
        return True

    label = f"Loading {files.component} ({format_bytes(part.nbytes)})"
    with reporter.task(label, len(part.tensors), "tensors") as task:
        for key, stored, scale in iterate_weights(part, filled):
            if scale is not None and not change and filler.keeps_scale(names.to_targets(key) or (), stored, scale):
                for name, (value, rows) in _cut_stored(files, key, stored, scale).items():
                    filler.store(name, value, rows)
            else:
                tensor = stored if scale is None else dequantize(stored, scale)
                for name, value in names.split(key, tensor).items():
                    dtype = dtype_of(name)
                    changed = change(name, value, dtype or value.dtype) if change else value
                    if not (filler.has_place(name) and filler.store(name, changed)):
                        filler.put(name, changed, dtype)
            task.advance()


class _Filler:
    """Fills a prepared module on the meta device; names are those of before it was prepared."""

    def __init__(
        self,
        module: nn.Module,
        store: WeightStore,
        replaced: Mapping[str, nn.Linear],
        device: torch.device,
        place: Place,
        packed: PackedWeights | None,
    ) -> None:
        self._module, self._store, self._device, self._place, self._packed = module, store, device, place, packed
        self._replaced = {f"{name}.weight": layer for name, layer in replaced.items()}
        self._paths = base_layers(module)
        self._waiting: dict[str, StoredLinear] = {}
        self.rejected: list[str] = []
        """Weights that the store cannot keep."""

    def swap_out(self, names: Sequence[Sequence[str]], layers: Sequence[Sequence[StoredLinear]]) -> None:
        """Have the weights of layers wait in host memory, in the groups that are copied together."""
        self._swap = BlockSwap(layers)
        for group, found in zip(names, layers, strict=True):
            self._waiting |= {f"{name}.weight": layer for name, layer in zip(group, found, strict=True)}

    def put(self, name: str, value: Tensor, dtype: torch.dtype | None) -> None:
        """Set a tensor; None: in its own dtype."""
        # A copy: a view of the file's memory would tie the model to a file that may be overwritten.
        if layer := self._waiting.get(name):
            self._swap.fill(layer, {"stored": value.to(device="cpu", dtype=dtype, copy=True)})
        else:
            self._set(name, value.to(device=self._device, dtype=dtype, copy=True))

    def has_place(self, name: str) -> bool:
        """Return whether a tensor is a weight in a layer of the store."""
        return name in self._replaced

    def keeps_scale(self, names: Collection[str], stored: Tensor, scale: Tensor) -> bool:
        """Return whether the store keeps a weight of the files as it is stored.

        That requires one scale per row, and that it consists of complete weights in layers of the store.
        """
        kept = scale.shape[1] == 1 and self._store.keeps_scale(stored.dtype)
        return kept and bool(names) and set(names) <= self._replaced.keys()

    def store(self, name: str, weight: Tensor, scale: Tensor | None = None) -> bool:
        """Have the store keep a weight in its layer; return False, and put the former layer back, if it cannot."""
        device = self._device_of(name)
        packed = self._store.pack(weight.to(device), None if scale is None else scale.to(device))
        if packed is None:
            self.rejected.append(name)
            self._restore(name)
            return False
        if self._packed and scale is None and sum(tensor.nbytes for tensor in packed.values()) < weight.nbytes:
            self._packed.keep(name, device, packed)
        self._set_packed(name, packed)
        return True

    def fill_packed(self, names: Collection[str]) -> bool:
        """Set weights as the store packed them at an earlier start, if all of them are there."""
        if self._packed is None or not names or not set(names) <= self._replaced.keys():
            return False
        found: dict[str, Mapping[str, Tensor]] = {}
        for name in names:
            packed = self._packed.find(name, self._device_of(name))
            if packed is None:
                return False
            found[name] = packed
        for name, tensors in found.items():
            self._set_packed(name, {leaf: tensor.to(self._device_of(name)) for leaf, tensor in tensors.items()})
        return True

    def _device_of(self, name: str) -> torch.device:
        """Return where a weight is packed and kept."""
        return torch.device("cpu") if name in self._waiting else self._device

    def _set_packed(self, name: str, packed: Mapping[str, Tensor]) -> None:
        if layer := self._waiting.get(name):
            self._swap.fill(layer, packed)
            return
        # An engine may set them together with other processes, some of which read them where others have packed them.
        for leaf, tensor in sorted(packed.items()):
            self._set(f"{name.removesuffix('weight')}{leaf}", tensor)

    def _set(self, name: str, tensor: Tensor) -> None:
        layer, _, leaf = name.rpartition(".")
        self._place(self._module, f"{self._paths[layer]}.{leaf}".removeprefix("."), tensor)

    def _restore(self, name: str) -> None:
        if layer := self._waiting.get(name):
            layer.format = PlainFormat()
            return
        plain, path = self._replaced[name], self._paths[name.removesuffix(".weight")]
        swapped = self._module.get_submodule(path)
        assert isinstance(swapped, nn.Linear)
        plain.bias = swapped.bias
        self._module.set_submodule(path, plain)


def _cut_stored(files: ComponentFiles, key: str, stored: Tensor, scale: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Split a stored weight of the files into those of the module, with their float32 scales per row, `[out, 1]`."""
    of_rows = scale.repeat_interleave(len(stored) // len(scale), 0)
    scales = files.layout.names.split(key, of_rows)
    pieces = files.layout.names.split(key, stored.view(torch.uint8))  # few operations support 8-bit floats
    return {name: (piece.view(stored.dtype), scales[name]) for name, piece in pieces.items()}


def swap_layers(
    facts: ComponentFacts, module: nn.Module, store: WeightStore, dtype: torch.dtype
) -> dict[str, nn.Linear]:
    """Put the layers of a store, which compute in `dtype`, into a module on the meta device; return those that they
    replace, by name.
    """
    replaced: dict[str, nn.Linear] = {}
    for name in stored_layers(facts, module, store):
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        replaced[name] = layer
        module.set_submodule(name, store.empty_layer(layer, dtype))
    return replaced


def _stored_layer(module: nn.Module, name: str, dtype: torch.dtype) -> StoredLinear:
    """Return a linear layer that can fetch its weight, put in the place of a plain one."""
    layer = module.get_submodule(name)
    if not isinstance(layer, StoredLinear):
        assert type(layer) is nn.Linear, f"{name} is {type(layer).__name__}"
        layer = StoredLinear(layer, PlainFormat(), dtype)
        module.set_submodule(name, layer)
    return layer


def stored_layers(facts: ComponentFacts, module: nn.Module, store: WeightStore) -> frozenset[str]:
    """Return the names of the linear layers of a component whose weights a store keeps."""
    layers = filter(store.takes, store.layers(module))
    return frozenset(name for name in layers if not facts.stays_float32(f"{name}.weight"))


def tie(module: nn.Module) -> None:
    """Tie shared tensors again: filling or moving them separates them."""
    if hasattr(module, "tie_weights"):
        module.tie_weights()  # type: ignore[operator]


def stored_dtypes(files: ComponentFiles) -> dict[str, str]:
    """Return the safetensors dtype of each tensor in a component's files, by module key.

    8-bit floats are returned as bfloat16: they would round away most of what training changes in a weight.
    """
    dtypes: dict[str, str] = {}
    for name, tensor in part_of(files).tensors.items():
        dtype_name = "BF16" if tensor.dtype.startswith("F8_") else tensor.dtype
        dtypes |= dict.fromkeys(files.layout.names.to_targets(name) or (), dtype_name)
    return dtypes
