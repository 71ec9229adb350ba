"""What happens inside a run of `train.py`, seen from outside through torch's own hooks."""

from collections.abc import Callable

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from mini_llava.model.llava import LlavaModel


def on_model(act: Callable[[LlavaModel], object]) -> None:
    """Call `act` with every model that this process builds from here on, before its parts get adapters or wrappers."""

    def registered(module: nn.Module, name: str, _part: nn.Module) -> None:
        if isinstance(module, LlavaModel) and name == "vision_tower":  # the first of its parts
            act(module)

    register_module_module_registration_hook(registered)


def before_each_step(act: Callable[[LlavaModel, int], None]) -> None:
    """Call `act` before the first micro-batch of each step, with the model and the micro-batches of the step before.

    What the trainer tries before step 1 belongs to step 1.
    """
    micro_batches, has_stepped = 0, True

    def forward(model: LlavaModel, _inputs: tuple) -> None:
        nonlocal micro_batches, has_stepped
        if has_stepped:
            act(model, micro_batches)
            micro_batches, has_stepped = 0, False
        micro_batches += 1

    def stepped(*_) -> None:
        nonlocal has_stepped
        has_stepped = True

    on_model(lambda model: model.register_forward_pre_hook(forward))
    register_optimizer_step_post_hook(stepped)
