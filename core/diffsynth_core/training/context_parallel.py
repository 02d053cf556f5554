"""Several processes that compute one sample together, each a part of its tokens (Ulysses: Jacobs et al. 2023,
arXiv:2309.14509), as the models of diffusers do it.

Attention exchanges tokens for heads: each process computes some heads over all tokens. What follows the prediction is
computed by all of them alike, and its gradient goes back to the tokens of each; so their gradients are parts of the
whole ones, which sum up over processes.
"""

import warnings
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from diffsynth_core.planning.plan import Machine


def divide_tokens(transformer: Any, machine: Machine, device: torch.device, timestep_of_each: bool) -> None:
    """Have a transformer of diffusers compute a part of each sample in this process, and return all of it.

    `ModelMixin.enable_parallelism` does the same, on GPUs alone; the private attributes are those that it sets and
    reads.

    Args:
        timestep_of_each: whether it is given a timestep for each token.
    """
    from diffusers import ContextParallelConfig, ParallelConfig
    from diffusers.hooks import apply_context_parallel

    # diffusers calls a function that torch has renamed.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\S+all_gather_tensor` is deprecated", FutureWarning)
    names = ("data", "ring", "ulysses")
    mesh = init_device_mesh(device.type, (machine.data_parallel, 1, machine.context_parallel), mesh_dim_names=names)
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=machine.context_parallel))
    config.setup(distributed.get_rank(), machine.world_size, device, mesh=mesh)
    for part in transformer.modules():
        processor = getattr(part, "processor", None)
        if processor is not None and hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
            if not part.is_cross_attention:
                keep_dtypes(part)
    # The module itself, "", has timesteps alone divided.
    divided = {place: tensors for place, tensors in transformer._cp_plan.items() if place or timestep_of_each}
    apply_context_parallel(transformer, config.context_parallel_config, divided)


def keep_dtypes(attention: Any) -> None:
    """Have the queries and keys of an attention in the dtype of its values, whatever autocast makes of their norms.

    On CUDA devices autocast computes norms in float32. The attention of diffusers that exchanges tokens would then fail
    in its backward pass, which is outside of autocast. So queries and keys are rounded before the rotary embedding as
    well as after it.
    """
    for norm in (attention.norm_q, attention.norm_k):
        norm.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))
