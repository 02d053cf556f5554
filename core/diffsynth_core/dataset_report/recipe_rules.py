"""Rules of a run, from its resolved parameters: the requirements of training for the dataset. No torch."""

from dataclasses import replace
from pathlib import Path

from diffsynth_core.config.parameters import SETTINGS, Parameters
from diffsynth_core.config.resolve import Resolved
from diffsynth_core.dataset_report.rules import Rules, general_rules, rules_of
from diffsynth_core.dataset_report.thresholds import Thresholds
from diffsynth_core.errors import FaultsFound, Problem, collect_problems, raise_if_any
from diffsynth_core.files import model_base_path
from diffsynth_core.hub.model_files import locate_folder, split_entry
from diffsynth_core.models.dataset_columns import setting_problems
from diffsynth_core.models.encoded_sizes import caption_encoder
from diffsynth_core.models.recognition import component_at
from diffsynth_core.models.registry import FAMILIES, unknown_family
from diffsynth_core.models.spec import FamilyFacts, TokenizerFacts, Variant
from diffsynth_core.models.token_counts import CaptionRule
from diffsynth_core.planning.model.components import find_components


def rules_of_run(resolved: Resolved, thresholds: Thresholds) -> Rules:
    """Return the requirements of a run for its dataset; those of all families if its family is unknown.

    Raises:
        FaultsFound: problems of the parameters, as found by training; of model files only unsupported ones.
    """
    raise_if_any(resolved.problems)
    parameters = resolved.parameters
    if parameters.model_paths or parameters.model_id_with_origin_paths:
        with collect_problems(missing_apart=True) as of_files:
            found = find_components(parameters, resolved.family, model_base_path())
        if found is None:
            raise FaultsFound([*of_files, *of_files.missing])
        facts, variant = found.facts, found.variant
    elif resolved.family in FAMILIES:
        facts = FAMILIES[resolved.family]
        variant = facts.variant({}, parameters.extra_inputs, "")
    else:
        unknown = [unknown_family(resolved.family, parameters.config)] if resolved.family else []
        raise_if_any([*unknown, *_without_family(resolved)])
        return general_rules(parameters, thresholds)
    raise_if_any(setting_problems(parameters, variant))
    name = parameters.recipe or (str(parameters.config) if parameters.config else variant.title)
    rules = rules_of(parameters, facts, variant, thresholds, name)
    return replace(rules, captions=caption_rule(parameters, facts, variant))


def _without_family(resolved: Resolved) -> list[Problem]:
    """Return problems of parameters that have no effect while the family is unknown."""
    names = [
        name
        for name, setting in SETTINGS.items()
        if resolved.origin(name).is_given and (setting.families or name in ("extra_inputs", "task"))
    ]
    return [
        Problem(
            f"`{name}` depends on the model, but none is given ({resolved.origins[name]})",
            "pass `--recipe` or `--config`",
            wrong_use=True,
        )
        for name in names
    ]


def caption_rule(parameters: Parameters, facts: FamilyFacts, variant: Variant) -> CaptionRule | None:
    """Return how the text encoder of a run reads captions, and its tokenizer folder; None if the family is unknown."""
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
    """Return the folders of the tokenizer relative to the text encoder's files in a recipe."""
    folders = []
    for entry in parameters.model_id_with_origin_paths:
        model_id, pattern = split_entry(entry) or ("", "")
        component = component_at(pattern, facts, model_id)
        if component and component.name == tokenizer.component:
            here = Path(pattern).parent
            folders += [f"{model_id}:{(here / folder).as_posix()}" for folder in tokenizer.folders]
    return folders
