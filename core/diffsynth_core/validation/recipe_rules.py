"""The rules of a recipe, from its name. No torch: families state their facts without it."""

from dataclasses import replace
from pathlib import Path

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.resolve import resolve_stages
from diffsynth_core.errors import DiffSynthError, raise_if_any
from diffsynth_core.families.encoded_sizes import caption_encoder
from diffsynth_core.families.interface import FamilyFacts, TokenizerFacts, Variant
from diffsynth_core.families.table import FAMILIES, component_at
from diffsynth_core.families.token_counts import CaptionRule
from diffsynth_core.files import model_base_path
from diffsynth_core.sources.model_files import locate_folder, split_entry
from diffsynth_core.validation.rules import Rules, Thresholds, rules_of, variant_without_files


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


def caption_rule(parameters: Parameters, facts: FamilyFacts, variant: Variant) -> CaptionRule | None:
    """How the text encoder of a run reads captions, and where its tokenizer lies; None when the family does not say."""
    encoder = caption_encoder(variant.encoders)
    caption = encoder.caption if encoder else None
    if caption is None:
        return None
    tokenizer = facts.tokenizers[caption.tokenizer]
    given: str | None = getattr(parameters, caption.tokenizer)
    places = [given] if given else [*_beside(parameters, facts, tokenizer), tokenizer.default]
    base = model_base_path()
    return CaptionRule(caption, next((folder for place in places if (folder := locate_folder(place, base))), None))


def _beside(parameters: Parameters, facts: FamilyFacts, tokenizer: TokenizerFacts) -> list[str]:
    """Where the tokenizer lies beside the files that a recipe names for its text encoder."""
    folders = []
    for entry in parameters.model_id_with_origin_paths:
        model_id, pattern = split_entry(entry) or ("", "")
        component = component_at(pattern, facts, model_id)
        if component and component.name == tokenizer.component:
            here = Path(pattern).parent
            folders += [f"{model_id}:{(here / folder).as_posix()}" for folder in tokenizer.folders]
    return folders
