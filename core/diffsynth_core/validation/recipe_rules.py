"""The rules of a recipe, from its name. No torch: families state their facts without it."""

from dataclasses import replace

from diffsynth_core.config.resolve import resolve_stages
from diffsynth_core.errors import DiffSynthError, raise_if_any
from diffsynth_core.families.table import FAMILIES
from diffsynth_core.validation.rules import Rules, Thresholds, rules_of, variant_without_files
from diffsynth_core.validation.token_counts import caption_rule


def rules_of_recipe(recipe: str, thresholds: Thresholds) -> Rules:
    """What the recipe's family asks of a dataset; of several stages the first says it.

    Raises:
        DiffSynthError: when there is no such recipe, or it names no family.
    """
    resolved = resolve_stages({"recipe": recipe})[0]
    raise_if_any(resolved.problems)
    facts = FAMILIES.get(resolved.family or "")
    if facts is None:
        raise DiffSynthError(f"recipe `{recipe}` names no family", "name another recipe")
    parameters = resolved.parameters
    variant = variant_without_files(parameters, facts)
    rules = rules_of(parameters, facts, variant, thresholds, recipe)
    return replace(rules, captions=caption_rule(parameters, facts, variant))
