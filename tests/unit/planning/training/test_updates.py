"""In which dtype weights train that nobody has chosen one for."""

import pytest

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.planning.machine.engines import ENGINES
from diffsynth_core.planning.training.updates import choose_dtype

FULL = {"trainable_models": "dit"}


@pytest.mark.parametrize(
    ("flags", "precision", "engine", "dtype"),
    [
        (FULL, "bf16", "replicated", "float32"),
        (FULL, "bf16", "fsdp2", "float32"),
        (FULL, "bf16", "zero1", "bf16"),
        (FULL, "bf16", "zero2", "bf16"),
        (FULL, "bf16", "zero3", "float32"),
        (FULL, "no", "zero2", "float32"),
        ({"lora_base_model": "dit"}, "bf16", "zero2", "float32"),
        ({**FULL, "trained_dtype": "float32"}, "bf16", "zero2", "float32"),
        ({**FULL, "trained_dtype": "bf16"}, "bf16", "fsdp2", "bf16"),
    ],
)
def test_weights_are_bf16_where_the_engine_updates_copies_and_holds_them_whole(flags, precision, engine, dtype):
    assert choose_dtype(Parameters.model_validate(flags), precision, ENGINES[engine]) == dtype
