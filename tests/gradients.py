"""What the facts of a family say about gradients, by the parameters of a module."""

from torch import nn

from diffsynth_core.models.spec import FamilyFacts, Variant, is_below


def unused_parameters(facts: FamilyFacts, component: str, module: nn.Module, variant: Variant) -> frozenset[str]:
    """Return the names of parameters that receive no gradient."""
    names = frozenset(name for name, _ in module.named_parameters())
    dead = variant.unused_params(facts.component(component), names)
    return frozenset(name for name in names if is_below(name, dead))
