"""What the training loop asks of an engine, which distributes a step over processes.

An engine owns the optimizer, the gradient scaler and clipping, and the training loop calls nothing else of them. All
methods are collective: every process calls them in the same order.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from torch import Tensor, nn

from diffsynth_core.checkpoints.saved_states import SavedState
from diffsynth_core.checkpoints.state import StateTensors
from diffsynth_core.optimizers.per_parameter import MakeOptimizer
from diffsynth_core.training.loader import MicroBatch
from diffsynth_core.training.model import SamplingStep, TrainingModule


class Engine(ABC):
    """Trains a module whose forward pass is the loss of each sample of a micro-batch, `[B]` float32."""

    @abstractmethod
    def place(self, component: nn.Module, name: str, tensor: Tensor) -> None:
        """Set a parameter or buffer of a component to what this process keeps of a whole tensor.

        At the first tensor of a component all its parameters are still on the meta device, with its LoRA and gradient
        checkpointing in place: the moment to shard it.
        """

    @abstractmethod
    def prepare(self, model: TrainingModule, make_optimizer: MakeOptimizer) -> None:
        """Take over a module whose weights are loaded, and create the optimizer of the parameters, or shards of them,
        that this process updates.
        """

    @abstractmethod
    def try_out(self, micro_batch: MicroBatch, reserved: int) -> Tensor:
        """Run a forward and a backward pass outside of steps, after which weights and gradients are as before.

        Args:
            reserved: bytes of the device that are taken meanwhile, in place of what the first step will add.

        Returns:
            The loss of each sample, `[B]` float32, detached.

        Raises:
            torch.OutOfMemoryError: if the device has not enough memory for them.
        """

    @abstractmethod
    def evaluate(self, inputs: MicroBatch | SamplingStep) -> Tensor:
        """Run a forward pass without gradients, outside of steps.

        Returns:
            The loss of each sample, `[B]` float32, or velocities: see the module's forward pass.
        """

    @abstractmethod
    def begin(self, rate: float, number: int) -> None:
        """Begin a step at this learning rate, before its passes.

        Args:
            number: of the step in the run, from which random numbers of the update are drawn, and on which the decay of
                averages depends.
        """

    @abstractmethod
    def forward_backward(self, micro_batch: MicroBatch, weight: float, last: bool) -> Tensor:
        """Add the gradients of `weight` times the sum of the losses, averaged over processes.

        Args:
            last: whether this is the last micro-batch of the step, after which gradients are complete in all processes.

        Returns:
            The loss of each sample, `[B]` float32, detached.
        """

    @abstractmethod
    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Return the sum of a small tensor over all processes."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Return the global norm of the gradients before clipping, and clip them if requested.

        Returns:
            Scalar float32 on the device of the module: to read it is to wait for the device, so the loop reads it
            together with the loss.
        """

    @property
    @abstractmethod
    def skips_overflow(self) -> bool:
        """Whether `step` itself skips non-finite gradients, as float16 scaling does."""

    @abstractmethod
    def step(self) -> bool:
        """End the step, after which weights are updated and gradients cleared; return False if it was skipped."""

    @property
    @abstractmethod
    def updating(self) -> bool:
        """Whether some weights may be updated and others not, so that they belong to no step."""

    @property
    @abstractmethod
    def gathers(self) -> bool:
        """Whether a whole tensor has to be gathered, so that no process can save without the others."""

    @abstractmethod
    def whole(self, tensor: Tensor) -> Tensor:
        """Return a parameter or buffer of the module as checkpoints hold it: whole, detached, on any device."""

    @abstractmethod
    def average(self, tensor: Tensor) -> Tensor:
        """Return the moving average of a trained parameter as `whole` does the parameter, in float32.

        Other tensors, and parameters before their first update, are their own average.
        """

    @abstractmethod
    def averaged(self) -> AbstractContextManager[None]:
        """Return a context, outside of steps, in which the trained weights of the module are their moving averages;
        after it they are what they were, to the bit.
        """

    @abstractmethod
    def state(self) -> StateTensors:
        """Return what a resumed run needs of the weights and the optimizer, whole.

        An engine that gathers does so for each tensor at the time of its access, of which all processes take part.
        """

    @abstractmethod
    def scaler_state(self) -> dict[str, int | float]:
        """Return the state of the gradient scaler; empty without one."""

    @abstractmethod
    def restore(self, saved: SavedState) -> None:
        """Continue from a saved state, whatever engine and number of processes saved it.

        Raises:
            DiffSynthError: if the state cannot be read, or belongs to other parameters.
        """

    @abstractmethod
    def wait(self) -> None:
        """Wait until all processes have reached this point."""
