"""Components and modules that parameters select for training without LoRA."""

from itertools import takewhile

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem, list_names, report, suggest
from diffsynth_core.models.spec import FamilyFacts, Layout, Shapes, is_below
from diffsynth_core.planning.model.model_plan import ModelPlan

PARAMETER = "trainable_models"
"""The parameter that selects them."""


def find_trained(parameters: Parameters, found: ModelPlan) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Return components that train in full, and component -> modules (public names) of those that train in part.

    Reports problems. A component that is named itself trains in full, even if modules of it are named too.
    """
    full: list[str] = []
    parts: dict[str, list[str]] = {}
    for name in dict.fromkeys(parameters.trainable_models):
        component, _, module = name.partition(".")
        if not check_component(component, PARAMETER, found):
            continue
        if not module:
            full.append(component)
        elif component in found.components:
            problem = _module_problem(component, module, found)
            if problem:
                report(problem)
            else:
                parts.setdefault(component, []).append(module)
    return tuple(full), {name: tuple(modules) for name, modules in parts.items() if name not in full}


def check_component(name: str, parameter: str, found: ModelPlan) -> bool:
    """Return whether a parameter names a component of the family that this variant has. Reports problems.

    Missing files of the component are reported elsewhere.
    """
    known = found.facts.component_names
    if name not in known:
        part = next((component for component in found.facts.components if name in component.parts), None)
        near = suggest(name, known)
        if part:
            hint = f"use `{part.parts[name] if parameter == PARAMETER else part.name}`"
        else:
            hint = f"did you mean `{near}`?" if near else f"components of {found.facts.title}: {', '.join(known)}"
        report(
            Problem(
                f"`{parameter}` names `{name}`, which is not a component of {found.facts.title}", hint, wrong_use=True
            )
        )
        return False
    if name in found.variant.components or found.facts.denoiser not in found.components:
        return True
    inputs = found.facts.component(name).inputs
    report(
        Problem(
            f"`{parameter}` names `{name}`, which {found.variant.title} does not have",
            f"remove it, or pass `--extra_inputs {inputs[0]}` and its files" if inputs else "remove it",
            wrong_use=True,
        )
    )
    return False


def prefix_problems(parameters: Parameters, facts: FamilyFacts) -> list[Problem]:
    """Return the problem of a `remove_prefix_in_ckpt` that no key starts with, such as a misspelled component."""
    asked = parameters.remove_prefix_in_ckpt
    begins = [f"pipe.{name}." for name in facts.component_names]
    if any(begin.startswith(asked) or asked.startswith(begin) for begin in begins):
        return []
    parts = {
        f"pipe.{name}.": f"pipe.{part}." for component in facts.components for name, part in component.parts.items()
    }
    near = parts.get(f"{asked.removesuffix('.')}.") or suggest(asked, begins)
    hint = f"did you mean `{near}`?" if near else f"keys start with {list_names(begins)}"
    return [Problem(f"`remove_prefix_in_ckpt`: no key of {facts.title} starts with `{asked}`", hint, wrong_use=True)]


def _module_problem(component: str, module: str, found: ModelPlan) -> Problem | None:
    """Return why a module of a component, given by its public name, cannot be trained."""
    layout, shapes = found.components[component].layout, found.shapes[component]
    own = layout.below([module], shapes)
    if not own:
        hint = _module_name_hint(component, module, layout, shapes)
        return Problem(f"`{PARAMETER}`: {component} has no module `{module}` with weights", hint, wrong_use=True)
    dead = found.variant.unused_params(found.facts.component(component), frozenset(shapes))
    if all(is_below(name, dead) for name in own):
        return Problem(
            f"`{PARAMETER}` names `{component}.{module}`, which receives no gradient in this setup",
            "remove it",
            wrong_use=True,
        )
    return None


def _module_name_hint(component: str, module: str, layout: Layout, shapes: Shapes) -> str:
    """Return the hint for an unknown module: its public name if the module key was given, or the closest name."""
    public_names = layout.public_keys.to_sources(shapes)
    typed = [layout.public_keys.to_source(own) or "" for own in shapes if is_below(own, [module])]
    levels = zip(*(name.split(".") for name in typed), strict=False)
    common = ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
    if common in public_names and module not in shapes:
        common = common.rpartition(".")[0]  # one tensor: a module was typed
    if common:
        return f"in the documented names this is `{component}.{common}`"
    modules = {".".join(name.split(".")[:depth]) for name in public_names for depth in range(1, name.count(".") + 1)}
    near = suggest(module, modules)
    outermost = dict.fromkeys(name.partition(".")[0] for name in public_names)
    return f"did you mean `{component}.{near}`?" if near else f"its modules are {list_names(list(outermost))}"
