"""How the frozen weights of each component are kept, from `fp8_models` and `quant_options`. No torch."""

import importlib.util
from collections.abc import Collection, Iterable, Iterator, Mapping
from shlex import quote

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.quant_options import QuantOption, split_quant_options
from diffsynth_core.errors import Problem, list_names, report, report_missing, suggest
from diffsynth_core.models.spec import ComponentFiles, Shapes, modules_with_weights
from diffsynth_core.models.weight_store import STORES, find_store

METHODS = {"fp8": "fp8", "int8": "int8", "nf4": "nf4", "bitsandbytes_nf4": "nf4"}
"""Method of `quant_options` -> weight store."""
INSTEAD = {
    "bitsandbytes_fp4": "nf4",
    "torchao_int8_w8a16": "int8",
    "torchao_fp8_w8a16": "fp8",
    "torchao_nvfp4_w4a16": "nf4",
    "comfy_kitchen_int8_w8a8": "int8",
    "comfy_kitchen_fp8_w8a8": "fp8",
}
"""Methods of DiffSynth-Studio under which a LoRA trains there -> the one here with as many bits."""


def storage_of(entries: Collection[str], parameters: Parameters) -> str:
    """Return the storage of the model that the parameters name by one of these entries; see `find_store`."""
    for option in split_quant_options(parameters.quant_options):
        if option.method in METHODS and not set(option.entries).isdisjoint(entries):
            return "/".join(filter(None, (METHODS[option.method], ",".join(option.left_out))))
    return "plain" if set(entries).isdisjoint(parameters.fp8_models) else "float8"


def storage_flag(storage: str) -> str:
    """Return the parameter that asks for a storage."""
    return "fp8_models" if storage == "float8" else "quant_options"


def check_storage(
    parameters: Parameters, components: Mapping[str, ComponentFiles], shapes: Mapping[str, Shapes]
) -> None:
    """Report wrong entries of `fp8_models` and `quant_options`, and what else prevents the storage they ask for.

    Args:
        shapes: of the tensors of each component.
    """
    check_entries(parameters, "fp8_models", parameters.fp8_models)
    options = []
    for option in split_quant_options(parameters.quant_options):
        if str(option) in _named(parameters):  # of which the last part would count as the method
            what = f"`quant_options` names no method for `{option}`"
            report(Problem(what, f"pass `--quant_options {quote(f'{option}:nf4')}`, or another method", wrong_use=True))
        else:
            options.append(option)
    check_entries(parameters, "quant_options", [entry for option in options for entry in option.entries])
    report(*_repeated(parameters, options), *_unknown_methods(options))
    for name, files in components.items():
        report(*_unknown_modules(files, shapes.get(name, {})))
    report_missing(*_missing_packages(options))


def check_entries(parameters: Parameters, parameter: str, entries: Iterable[str]) -> None:
    """Check that a parameter names entries of the model parameters, so that a typo is not ignored."""
    named = _named(parameters)
    for entry in entries:
        if entry not in named:
            near = suggest(entry, named)
            hint = f"did you mean `{near}`?" if near else f"the entries are {list_names(named)}"
            what = f"`{parameter}` names `{entry}`, which is not an entry of the model parameters"
            report(Problem(what, hint, wrong_use=True))


def _named(parameters: Parameters) -> list[str]:
    """Return what names model files."""
    return [*parameters.model_id_with_origin_paths, *(path for group in parameters.model_paths for path in group)]


def _repeated(parameters: Parameters, options: Iterable[QuantOption]) -> Iterator[Problem]:
    """Yield entries that are quantized twice, or in 8-bit floats without a scale too."""
    seen: set[str] = set()
    for option in options:
        for entry in dict.fromkeys(option.entries):
            if entry in seen:
                yield Problem(f"`quant_options` names `{entry}` twice", "keep one of them", wrong_use=True)
            elif entry in parameters.fp8_models:
                what = f"`fp8_models` and `quant_options` both name `{entry}`"
                yield Problem(what, "remove it from one of them", wrong_use=True)
            seen.add(entry)


def _unknown_methods(options: Iterable[QuantOption]) -> Iterator[Problem]:
    for method in dict.fromkeys(option.method for option in options):
        if method not in METHODS:
            near = INSTEAD.get(method) or suggest(method, METHODS)
            hint = f"use `{near}`" if method in INSTEAD else f"did you mean `{near}`?" if near else None
            what = f"`quant_options`: the method `{method}` is not known; the methods are {', '.join(METHODS)}"
            yield Problem(what, hint, wrong_use=True)


def _unknown_modules(files: ComponentFiles, shapes: Shapes) -> Iterator[Problem]:
    """Yield names of modules that are left out of the quantization of a component, and that it does not have."""
    modules = modules_with_weights(shapes)
    for name in find_store(files.storage).left_out if modules else ():
        if not any(f".{module}".endswith(f".{name}") for module in modules):
            ends = sorted({".".join(module.split(".")[begin:]) for module in modules for begin in (-1, -2)})
            near = suggest(name, ends)
            what = f"`quant_options` leaves `{name}` out of {files.component}, which has no module of that name"
            yield Problem(what, f"did you mean `{near}`?" if near else None, wrong_use=True)


def _missing_packages(options: Iterable[QuantOption]) -> Iterator[Problem]:
    for method in dict.fromkeys(option.method for option in options if option.method in METHODS):
        package = STORES[METHODS[method]].package
        if package and importlib.util.find_spec(package) is None:
            what = f"`quant_options`: `{method}` needs the package {package}, which is not installed"
            yield Problem(what, f"`pip install 'diffsynth-cli[{package}]'`")
