"""Stable Diffusion 3 and 3.5, and the built-in *micro*: an MMDiT of rectified flow in the latents of an auto-encoder.

Text tokens carry no position of their own once they are encoded. So n equal ones, such as the 256 zeros that stand in
for an absent T5 encoder, act as one token counted n times, and adding log n to that token's attention logits gives the
same output for less work: exp(s + log n) = n exp(s). `encode` folds them; `WeightedAttention` counts them.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab.batch import Condition
from trimtab.pipelines import few_step
from trimtab.pipelines.flow import Flow
from trimtab.roles import Roles
from trimtab.solvers import few_step_grid, time_grid

MAX_TEXT_TOKENS = 256  # of T5; the default of StableDiffusion3Pipeline


class SD3(Flow):
    """A `StableDiffusion3Pipeline` with roles over its transformer."""

    PIPELINE = StableDiffusion3Pipeline

    def __init__(self, pipe: StableDiffusion3Pipeline, roles: Roles, precision: torch.dtype):
        self._weight = _folded(pipe, next(roles.network.parameters()).device)
        super().__init__(pipe, roles, precision)

    @classmethod
    def understood(cls, config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Values of a scheduler's configuration; a student's times are asked of it, and may end anywhere."""
        anywhere = {"shift_terminal": (config.get("shift_terminal"),)}
        return super().understood(config) | (anywhere if config.get("stochastic_sampling") else {})

    @staticmethod
    def prepare(network: SD3Transformer2DModel) -> None:
        """Let its attention count tokens."""
        network.set_attn_processor(WeightedAttention())

    def time_grid(self, num_steps: int, resolution: int | None = None) -> Tensor:
        """Times (T + 1,) from 1 to 0 as the pipeline's own scheduler would take them."""
        return time_grid(num_steps, self.pipe.scheduler.config.shift)

    def few_step_grid(self, num_steps: int, resolution: int | None = None) -> Tensor:
        """Times (T + 1,) at which a student is called, with the model's own shift."""
        if self.is_student:
            return few_step.times_of(self.pipe.scheduler, num_steps)
        return few_step_grid(num_steps, self.pipe.scheduler.config.shift)

    def student_scheduler(self, num_calls: int, resolution: int | None = None) -> FlowMatchEulerDiscreteScheduler:
        """With which stock diffusers samples a student of this model."""
        return few_step.flow_scheduler(num_calls, self.pipe.scheduler.config.shift)

    def _embed(self, texts: Sequence[str]) -> Condition:
        texts = list(texts)
        for_t5, num_t5 = (texts, MAX_TEXT_TOKENS) if self._weight is None else ([""] * len(texts), 1)
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            texts, texts, for_t5, device=self.device, do_classifier_free_guidance=False, max_sequence_length=num_t5
        )
        return Condition(tokens, pooled, self._weight)

    def _output(self, role: str, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        weight = {} if condition.weight is None else {"log_weight": condition.weight.log()}
        return self.roles(
            role,
            hidden_states=x_t,
            timestep=self.process.timestep(t),
            encoder_hidden_states=condition.tokens,
            pooled_projections=condition.pooled,
            joint_attention_kwargs=weight,
            return_dict=False,
        )[0]


def _folded(pipe: StableDiffusion3Pipeline, device: torch.device) -> Tensor | None:
    """What each text token counts for (L,) where T5's all are one; None where they may differ.

    T5's tokens come last, and are one over and over if there is no T5 or if its vocabulary is a single word.
    """
    t5 = pipe.text_encoder_3
    if t5 is not None and t5.config.vocab_size > 1:
        return None
    return torch.tensor([1.0] * pipe.tokenizer_max_length + [MAX_TEXT_TOKENS], device=device)


def _kernel(value: Tensor) -> AbstractContextManager:
    """In bf16 over few tokens, torch's fused CPU attention goes backward four times slower than plain products.

    The choice is the same without gradient, so that equal weights predict equal bits: CRD's log-ratio starts at 0.
    """
    plain = value.device.type == "cpu" and value.shape[2] < 512
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


class WeightedAttention:
    """Joint attention of SD3's blocks in which a text token may count more than once (`log_weight`, (L,))."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        log_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        num_pixels = hidden_states.shape[1]
        parts = [self._heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))]
        if encoder_hidden_states is not None:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            parts.append(self._heads(attn, encoder_hidden_states, projections, (attn.norm_added_q, attn.norm_added_k)))
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))  # (B, heads, N + L, d)
        counted = encoder_hidden_states is not None and log_weight is not None
        bias = None
        if counted:  # pixels and soft tokens, which stand before and after, count once
            around = (num_pixels, key.shape[2] - num_pixels - len(log_weight))
            bias = F.pad(log_weight, around).to(value)[None, None, None]  # (1, 1, 1, N + L)
        with _kernel(value):
            out = F.scaled_dot_product_attention(query.to(value), key.to(value), value, attn_mask=bias)
        out = out.transpose(1, 2).flatten(2)  # (B, N + L, D)
        pixels = attn.to_out[1](attn.to_out[0](out[:, :num_pixels]))
        if encoder_hidden_states is None:
            return pixels
        text = out[:, num_pixels:]
        return pixels, text if attn.context_pre_only else attn.to_add_out(text)

    @staticmethod
    def _heads(attn: Attention, states: Tensor, projections: Sequence, norms: Sequence) -> list[Tensor]:
        """Query, key and value (B, heads, N, d), the first two normalised if the model does so."""
        heads = [p(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in projections]
        return [head if norm is None else norm(head) for head, norm in zip(heads, (*norms, None), strict=True)]
