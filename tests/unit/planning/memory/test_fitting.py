"""Which changes make a run fit: the cheapest, none that is not needed, and none that does not help."""

from dataclasses import replace

import pytest

from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.planning.memory.estimate import device_memory
from diffsynth_core.planning.memory.fit_options import FITTED, MemoryOption, memory_options, parameter_changes
from diffsynth_core.planning.memory.fitting import TIGHT_BYTES, MemoryFit, find_fit
from diffsynth_core.planning.memory.memory_config import MemoryConfig, memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import RunPlan

GIB = 2**30


def config_of(plan: RunPlan, **changes: object) -> MemoryConfig:
    return replace(memory_config(plan, find_workload(plan).largest), **changes)


def same_training(plan: RunPlan) -> list[MemoryOption]:
    """The options that leave what is trained as it is, whose sizes need no measurement."""
    return [option for option in memory_options(plan, config_of(plan)) if option.cost != "scope"]


def flags(fit: MemoryFit) -> list[str]:
    return [change.flag for change in fit.changes]


def test_what_costs_only_time_comes_first_and_other_training_last(plan):
    made = plan(batch_size=2, use_gradient_checkpointing=False)
    options = memory_options(made, config_of(made))
    costs = [option.cost for option in options]
    assert list(dict.fromkeys(costs)) == ["time", "precision", "quality", "scope"]
    assert costs == sorted(costs, key=["time", "precision", "quality", "scope"].index)
    for option in options:
        assert (option.cost == "scope") == set(option.parameters).isdisjoint(FITTED), option
    never = {"batch_size", "lora_rank", "max_pixels", "num_frames", "height", "width"}
    assert never.isdisjoint(FITTED) and set(FITTED) <= SETTINGS.keys()


@pytest.mark.parametrize("recipe", ["flux.1-dev-lora", "flux.1-dev-full", "wan2.1-t2v-1.3b-lora"])
def test_the_changes_are_what_the_options_do(plan, recipe):
    """Planned with its parameters, a run has the memory that the option promised."""
    made = plan(recipe, use_gradient_checkpointing=False, batch_size=2)
    config = config_of(made)
    tried = set()
    for option in memory_options(made, config):
        for degree in option.degrees[:: max(1, len(option.degrees) - 1)]:
            changes = parameter_changes(made, degree(config), config)
            assert changes and {change.parameter for change in changes} <= {*option.parameters}
            again = config_of(plan(recipe, **{"use_gradient_checkpointing": False, "batch_size": 2,
                                              **{change.parameter: change.value for change in changes}}))  # fmt: skip
            assert again == degree(config), changes
            tried |= {*option.parameters}
    assert tried >= {"use_gradient_checkpointing", "use_gradient_checkpointing_offload", "batch_size"}


def test_what_is_kept_beside_inputs_is_given_up_first_in_full_and_then_nested(plan):
    made = plan(checkpointing="keep_attention")
    config = config_of(made)
    (option,) = [each for each in memory_options(made, config) if "checkpointing" in each.parameters]
    changes = [parameter_changes(made, degree(config), config) for degree in option.degrees]
    assert [(change.parameter, change.value) for (change,) in changes] == [
        ("checkpointing", "full"),
        ("checkpointing", "nested"),
    ]
    assert not [
        each for each in memory_options(made, config) if "use_gradient_checkpointing_offload" in each.parameters
    ]


@pytest.mark.slow
def test_nothing_is_changed_that_is_not_needed(plan):
    made = plan(use_gradient_checkpointing=False)
    config = config_of(made)
    needed = device_memory(made, config).peak
    assert find_fit(made, config, needed + TIGHT_BYTES).tried == ()
    options = same_training(made)
    tight = find_fit(made, config, needed, options=options)
    assert tight.fits_unchanged and tight.is_tight and flags(tight) == ["--use_gradient_checkpointing"]
    fit = find_fit(made, config, 20 * GIB, options=options)
    assert fit.fits and not fit.fits_unchanged and fit.left >= TIGHT_BYTES
    for left_out in fit.changes:
        others = {change.parameter: change.value for change in fit.changes if change != left_out}
        without = plan(**{"use_gradient_checkpointing": False, **others})
        assert device_memory(without, config_of(without)).peak > 20 * GIB - TIGHT_BYTES, left_out


@pytest.mark.slow
def test_a_change_that_saves_nothing_is_not_put_upon_others(plan):
    made = plan()
    fit = find_fit(made, config_of(made), 0, options=same_training(made))
    assert not fit.fits and fit.changes == ()
    peaks = [trial.peak for trial in fit.tried]
    assert peaks == sorted(peaks, reverse=True)
    last = [change.parameter for change in fit.tried[-1].changes]
    assert len(last) == len(set(last))


def test_weights_that_train_are_not_quantized(plan):
    made = plan("flux.1-dev-full")
    config = config_of(made)
    names = {option.degrees[0](config).storage["dit"] for option in memory_options(made, config)}
    assert names == {"plain"}


@pytest.mark.parametrize("given", [{"optimizer": "lion"}, {"optimizer_args": "eps=1e-7"}])
def test_an_optimizer_that_the_user_chose_stays(plan, given):
    made = plan(**given)
    assert not [option for option in memory_options(made, config_of(made)) if "optimizer" in option.parameters]


def test_an_optimizer_that_other_parameters_do_not_go_with_is_no_option(plan):
    made = plan(adam_betas=[0.9, 0.99])
    names = {option.degrees[0](config_of(made)).optimizer.name for option in memory_options(made, config_of(made))}
    assert names == {"adamw", "adamw8bit"}  # Adafactor has no such parameter


def test_host_memory_is_a_limit_too(plan):
    made = plan()
    config = config_of(made, recompute=True)
    limit = device_memory(made, replace(config, offload=True)).peak + TIGHT_BYTES
    waiting = [option for option in memory_options(made, config) if "offload" in option.parameters[0]]
    assert flags(find_fit(made, config, limit, options=waiting)) == ["--use_gradient_checkpointing_offload"]
    fit = find_fit(made, config, limit, host_limit=0, options=waiting)
    assert not fit.fits and fit.changes == ()
