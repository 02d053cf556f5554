"""What parameters name as a component to train, or to change before training."""

from diffsynth_core.errors import Problem, suggest
from diffsynth_core.planning.components import FoundComponents


def check_component(name: str, parameter: str, found: FoundComponents, problems: list[Problem]) -> bool:
    """Whether a parameter names a component of the family that this kind of model has. Adds to `problems`.

    That the files of such a component are missing is told elsewhere.
    """
    known = found.facts.component_names
    if name not in known:
        near = suggest(name, known)
        what = f"`{parameter}` names `{name}`, which is no component of {found.facts.title}"
        hint = f"did you mean `{near}`?" if near else f"components of {found.facts.title}: {', '.join(known)}"
    elif found.facts.denoiser in found.components and name not in found.variant.components:
        what = f"`{parameter}` names `{name}`, which {found.variant.title} does without"
        hint = "leave it out"
    else:
        return True
    problems.append(Problem(what, hint, wrong_use=True))
    return False
