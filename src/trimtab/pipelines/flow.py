"""What the transformers of rectified flow share: where a LoRA goes, and schedulers whose times are known."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from trimtab.pipelines.face import Face
from trimtab.process import NUM_TIMESTEPS, RectifiedFlow
from trimtab.roles import Roles

UNDERSTOOD = {  # values of a scheduler's configuration; any other would move the times away from those of `time_grid`
    "num_train_timesteps": (NUM_TIMESTEPS,),
    "use_dynamic_shifting": (False, None),
    "time_shift_type": ("exponential",),
    "shift_terminal": (None,),
    "invert_sigmas": (False, None),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
}


class Flow(Face):
    """A pipeline with roles over its transformer. A family adds how it embeds prompts, its times and its network."""

    NETWORK = "transformer"
    TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    SCHEDULERS = (FlowMatchEulerDiscreteScheduler,)

    def __init__(self, pipe: DiffusionPipeline, roles: Roles, precision: torch.dtype):
        super().__init__(pipe, roles, precision, RectifiedFlow(), "flow")

    @classmethod
    def understood(cls, config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Values of a scheduler's configuration at which its times are known."""
        return UNDERSTOOD
