"""Modules of a component that receive LoRA: by suffixes of names, by a regular expression, or automatically."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem, list_names, report, suggest
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.shapes import layers_of_blocks
from diffsynth_core.models.spec import (
    ComponentFacts,
    ComponentFiles,
    Layout,
    Shapes,
    is_below,
    match_targets,
    modules_with_weights,
)
from diffsynth_core.planning.model.model_plan import ModelPlan

_SPECIAL = frozenset("\\^$*+?{}[]|()")
"""Characters of regular expressions that no name contains."""
_BLOCK = re.compile(r"(.*?)\.\d+\.(.+)")


@dataclass(frozen=True)
class LoraTargets:
    """The modules that receive LoRA, by public name.

    Attributes:
        untrainable_targets: selected modules that receive no gradient.
        skipped_modules: modules of the same kinds in other blocks, which are not selected.
        rule: how they were selected if not by suffixes, in words.
    """

    modules: tuple[str, ...] = ()
    untrainable_targets: tuple[str, ...] = ()
    skipped_modules: tuple[str, ...] = ()
    rule: str | None = None


def find_lora_targets(parameters: Parameters, component: str, found: ModelPlan) -> LoraTargets:
    """Return the modules that `lora_target_modules` selects. Reports problems.

    Unset: the family's documented list. Empty: the linear layers of repeated blocks. One value: the modules whose
    names end with it or, if there are none, those whose full name matches it as a regular expression. Several:
    suffixes of names.
    """
    facts, asked = found.facts.component(component), parameters.lora_target_modules
    if asked == ():
        return _automatic(found, component)
    targets = asked or facts.lora_targets
    if not targets:
        hint = (
            'set them with `--lora_target_modules`, or let them be selected automatically: `--lora_target_modules ""`'
        )
        report(Problem(f"`{component}` has no documented LoRA targets", hint, wrong_use=True))
        return LoraTargets()
    layout, shapes = found.components[component].layout, found.shapes[component]
    modules = modules_with_weights(layout.public_shapes(shapes))
    matches, rule = match_targets(modules, targets), None
    if len(targets) == 1 and not matches[targets[0]]:
        (pattern,) = targets
        fitting = _fitting(pattern, modules)
        if fitting is None:
            return LoraTargets()
        matches, rule = {pattern: fitting}, f"modules that match `{pattern}`"
    report(*[_unmatched(target, modules, layout, shapes, facts) for target, names in matches.items() if not names])
    names = {name for names in matches.values() for name in names}
    report(*(_unfit(found, component, names) if asked else []))
    return _reachable(found, component, names, rule)


def _unfit(found: ModelPlan, component: str, names: Collection[str]) -> list[Problem]:
    """Return a problem for each kind of the modules (by public name) that cannot have a LoRA."""
    from diffsynth_core.models.blocks import kinds_without_lora

    files, shapes = found.components[component], found.shapes[component]
    public_keys = files.layout.public_keys
    own = {part: name for name in names for part in public_keys.to_targets(name) or ()}
    kinds = kinds_without_lora(load_family(found.facts.name), files, own)
    of_kind: dict[str, list[str]] = defaultdict(list)
    for part, kind in kinds.items():
        of_kind[f"of type `{kind}`"].append(own[part])
    for part, name in own.items():
        weight = f"{name}.weight"
        if len(shapes[f"{part}.weight"]) != len(public_keys.fuse_shape(weight, shapes)):
            of_kind["that are convolutions in the files but linear layers here"].append(name)
    return [
        Problem(
            f"`lora_target_modules` matches modules of {component} {kind}, which do not support LoRA: "
            f"{list_names(sorted(set(unfit)))}",
            "use linear layers or plain convolutions",
            wrong_use=True,
        )
        for kind, unfit in of_kind.items()
    ]


def _automatic(found: ModelPlan, component: str) -> LoraTargets:
    """Return the linear layers of repeated blocks that have public names.

    DiffSynth-Studio selects the same, except for layers with a side below 512, which the supported transformers lack.
    """
    files = found.components[component]
    layers = _layers_of_blocks(found, files)
    if layers is None:
        return LoraTargets()  # faulty files are reported elsewhere
    names = set(files.layout.public_keys.to_sources(layers))
    if not names:
        what = f"`lora_target_modules` is empty, and {component} has no linear layers in repeated blocks to choose from"
        report(Problem(what, "set its modules", wrong_use=True))
    return _reachable(found, component, names, "the linear layers of repeated blocks")


def _layers_of_blocks(found: ModelPlan, files: ComponentFiles) -> Collection[str] | None:
    """Return the linear layers of repeated blocks of the module or, if unknown, by published shapes."""
    if files.component in found.published:
        return layers_of_blocks(found.shapes[files.component])
    from diffsynth_core.models.blocks import find_linear_layers_of_blocks

    return find_linear_layers_of_blocks(load_family(found.facts.name), files)


def _fitting(pattern: str, modules: frozenset[str]) -> list[str] | None:
    """Return the modules whose full name matches a regular expression; None, with a problem, if it is invalid."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        what = f"`lora_target_modules` `{pattern}`: no module name ends with it, and it is not a valid regular expression: {error}"
        report(Problem(what, "fix it", wrong_use=True))
        return None
    return sorted(filter(expression.fullmatch, modules))


def _reachable(found: ModelPlan, component: str, names: Collection[str], rule: str | None) -> LoraTargets:
    """Return the modules by public name, without those that receive no gradient."""
    public_keys = found.components[component].layout.public_keys
    dead = found.variant.unused_params(found.facts.component(component), frozenset(found.shapes[component]))
    alive = {name for name in names if not all(is_below(part, dead) for part in public_keys.to_targets(name) or ())}
    if names and not alive:
        what = f"`lora_target_modules` matches only modules that receive no gradient: {list_names(sorted(names))}"
        report(Problem(what, "choose other modules", wrong_use=True))
    modules = modules_with_weights(found.components[component].layout.public_shapes(found.shapes[component]))
    kinds = {kind for name in alive if (kind := _kind_in_blocks(name))}
    alike = {name for name in modules - set(names) if _kind_in_blocks(name) in kinds}
    skipped_modules = {
        name for name in alike if not all(is_below(part, dead) for part in public_keys.to_targets(name) or ())
    }
    return LoraTargets(
        tuple(sorted(alive)), tuple(sorted(set(names) - alive)), tuple(sorted(skipped_modules, key=_by_number)), rule
    )


def _kind_in_blocks(module: str) -> tuple[str, str] | None:
    """Return the blocks of a module, and its name within its block; None outside blocks."""
    found = _BLOCK.match(module)
    return (found[1], found[2]) if found else None


def _by_number(module: str) -> list[tuple[int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(int(part) if part.isdigit() else -1, part) for part in module.split(".")]


def _unmatched(target: str, modules: frozenset[str], layout: Layout, shapes: Shapes, facts: ComponentFacts) -> Problem:
    """Return the problem of a target without a match, with its public name or the closest suffix as the hint."""
    parts = match_targets(modules_with_weights(shapes), (target,))[target]
    called = frozenset(filter(None, map(layout.public_keys.to_source, parts)))
    addressing = [name for name, found in match_targets(called, facts.lora_targets).items() if found]
    endings = {".".join(name.split(".")[depth:]) for name in modules for depth in (-1, -2)}
    near = suggest(target, endings)
    if addressing:
        hint = f"in the documented names this is {list_names(addressing)}"
    elif near:
        hint = f"did you mean `{near}`?"
    else:
        hint = f"the documented targets are {', '.join(facts.lora_targets) or 'none'}"
    pattern = " or matches it as a regular expression" if _SPECIAL & set(target) else ""
    what = f"`lora_target_modules`: no module of {facts.name} ends with `{target}`{pattern}"
    return Problem(what, hint, wrong_use=True)


def kinds_of(modules: Sequence[str]) -> dict[str, Counter[str]]:
    """Count the modules by kind within the blocks that they belong to: `blocks.*` -> `attn.to_q` -> 24.

    Modules outside blocks are listed under the empty name.
    """
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for module in modules:
        found = _BLOCK.match(module)
        kinds[f"{found[1]}.*" if found else ""][found[2] if found else module] += 1
    return kinds
