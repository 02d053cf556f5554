"""What parameters name to train without LoRA, or to change before training: components, or modules of them."""

from itertools import takewhile

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem, list_names, suggest
from diffsynth_core.models.spec import FamilyFacts, Layout, Shapes, is_below
from diffsynth_core.planning.components import FoundComponents

PARAMETER = "trainable_models"


def find_trained(
    parameters: Parameters, found: FoundComponents, problems: list[Problem]
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Components that train as a whole, and the modules of others that do, by documented name. Adds to `problems`.

    A component that is named whole trains whole, whatever is named of it beside that.
    """
    full: list[str] = []
    parts: dict[str, list[str]] = {}
    for name in dict.fromkeys(parameters.trainable_models):
        component, _, module = name.partition(".")
        if not check_component(component, PARAMETER, found, problems):
            continue
        if not module:
            full.append(component)
        elif component in found.components:
            problem = _module_problem(component, module, found)
            if problem:
                problems.append(problem)
            else:
                parts.setdefault(component, []).append(module)
    return tuple(full), {name: tuple(modules) for name, modules in parts.items() if name not in full}


def check_component(name: str, parameter: str, found: FoundComponents, problems: list[Problem]) -> bool:
    """Whether a parameter names a component of the family that this kind of model has. Adds to `problems`.

    That the files of such a component are missing is told elsewhere.
    """
    known = found.facts.component_names
    if name not in known:
        part = next((component for component in found.facts.components if name in component.parts), None)
        near = suggest(name, known)
        if part:
            hint = f"here it is called `{part.parts[name] if parameter == PARAMETER else part.name}`"
        else:
            hint = f"did you mean `{near}`?" if near else f"components of {found.facts.title}: {', '.join(known)}"
        problems.append(
            Problem(
                f"`{parameter}` names `{name}`, which is not a component of {found.facts.title}", hint, wrong_use=True
            )
        )
        return False
    if name in found.variant.components or found.facts.denoiser not in found.components:
        return True
    inputs = found.facts.component(name).inputs
    problems.append(
        Problem(
            f"`{parameter}` names `{name}`, which {found.variant.title} does not have",
            f"remove it, or pass `--extra_inputs {inputs[0]}` and its files" if inputs else "remove it",
            wrong_use=True,
        )
    )
    return False


def prefix_problems(parameters: Parameters, facts: FamilyFacts) -> list[Problem]:
    """The problem that the text to take off keys begins none of them: a component misspelt, or called as elsewhere."""
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


def _module_problem(component: str, module: str, found: FoundComponents) -> Problem | None:
    """Why a module of a component, typed by its documented name, cannot be trained."""
    layout, shapes = found.components[component].layout, found.shapes[component]
    own = layout.below([module], shapes)
    if not own:
        hint = _called(component, module, layout, shapes)
        return Problem(f"`{PARAMETER}`: {component} has no module `{module}` with weights", hint, wrong_use=True)
    dead = found.variant.unused_params(found.facts.component(component), frozenset(shapes))
    if all(is_below(name, dead) for name in own):
        return Problem(
            f"`{PARAMETER}` names `{component}.{module}`, which receives no gradient in this setup",
            "remove it",
            wrong_use=True,
        )
    return None


def _called(component: str, module: str, layout: Layout, shapes: Shapes) -> str:
    """What a module is called in documented names, when it was typed by that of the model in memory; or the nearest."""
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
