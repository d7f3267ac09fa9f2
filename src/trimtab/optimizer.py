"""AdamW and its learning rate."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import nn

from trimtab.config import Strict


class OptimizerConfig(Strict):
    """AdamW for every trained network; names and defaults as in diffusers' training scripts."""

    learning_rate: float = Field(1e-4, gt=0)
    learning_rates: dict[str, PositiveFloat] = Field(default_factory=dict)  # of networks with a rate of their own
    lr_scheduler: Literal["constant", "cosine", "cosine_with_restarts"] = "constant"
    lr_num_cycles: int = Field(1, gt=0)  # of cosine_with_restarts
    lr_warmup_steps: int = Field(0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(1e-4, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)


def rate_of(config: OptimizerConfig, network: str) -> float:
    """The learning rate of a network, before warm-up and decay."""
    return config.learning_rates.get(network, config.learning_rate)


def adamw(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """The optimizer of one network."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=True,
    )


def lr_factor(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Share of the learning rate at a step: a linear warm-up, then constant, or one half cosine or several to zero."""
    warmup = min(1.0, (step + 1) / (config.lr_warmup_steps + 1))
    if config.lr_scheduler == "constant":
        return warmup
    done = max(0, step - config.lr_warmup_steps) / max(1, num_steps - config.lr_warmup_steps)
    if config.lr_scheduler == "cosine_with_restarts":
        done = done * config.lr_num_cycles % 1
    return warmup * 0.5 * (1 + math.cos(math.pi * done))
