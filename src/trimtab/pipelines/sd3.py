"""Stable Diffusion 3 and 3.5, and the built-in *micro*: an MMDiT of rectified flow in the latents of an auto-encoder.

Text tokens carry no position of their own once they are encoded. So n equal ones, such as the 256 zeros that stand in
for an absent T5 encoder, act as one token counted n times, and adding log n to that token's attention logits gives the
same output for less work: exp(s + log n) = n exp(s). `encode` folds them; `WeightedAttention` counts them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab.batch import Condition
from trimtab.prediction import Prediction
from trimtab.process import RectifiedFlow
from trimtab.roles import Roles
from trimtab.solvers import guided, time_grid

MAX_TEXT_TOKENS = 256  # of T5; the default of StableDiffusion3Pipeline


class SD3:
    """A `StableDiffusion3Pipeline` with roles over its transformer. Everything else in it is frozen."""

    NETWORK = "transformer"
    PIPELINE = StableDiffusion3Pipeline

    def __init__(self, pipe: StableDiffusion3Pipeline, roles: Roles, precision: torch.dtype):
        self.pipe, self.roles, self.precision = pipe, roles, precision
        self.process = RectifiedFlow()
        self.device = next(roles.network.parameters()).device
        roles.network.set_attn_processor(WeightedAttention())
        for module in roles.network.modules():
            if isinstance(module, LoraLayer):  # autocast casts; PEFT would cast up first, for nothing
                module.cast_input_dtype_enabled = precision == torch.float32
        self._embeddings: dict[str, tuple[Tensor, Tensor]] = {}
        self._weight = self._folded()
        self.unconditional = self.encode([""])

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a square picture, `resolution` pixels a side."""
        side = resolution // self.pipe.vae_scale_factor
        return self.roles.network.config.in_channels, side, side

    @property
    def resolution(self) -> int:
        """The side in pixels that the model was made for."""
        return self.roles.network.config.sample_size * self.pipe.vae_scale_factor

    def time_grid(self, num_steps: int) -> Tensor:
        """Times (T + 1,) from 1 to 0 as the pipeline's own scheduler would take them."""
        return time_grid(num_steps, self.pipe.scheduler.config.shift)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Condition:
        """The condition of P prompts; each distinct prompt is encoded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._embeddings]
        if new:
            condition = self.embed(new)
            self._embeddings |= dict(zip(new, zip(condition.tokens, condition.pooled, strict=True), strict=True))
        tokens, pooled = zip(*(self._embeddings[text] for text in texts), strict=True)
        return Condition(torch.stack(tokens), torch.stack(pooled), self._weight)

    def embed(self, texts: Sequence[str]) -> Condition:
        """The same with gradient and without memory, for whoever trains the text encoders."""
        texts = list(texts)
        for_t5, num_t5 = (texts, MAX_TEXT_TOKENS) if self._weight is None else ([""] * len(texts), 1)
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            texts, texts, for_t5, device=self.device, do_classifier_free_guidance=False, max_sequence_length=num_t5
        )
        return Condition(tokens.float(), pooled.float(), self._weight)

    def predict(
        self, x_t: Tensor, t: Tensor, condition: Condition, role: str, guidance_scale: float = 1.0
    ) -> Prediction:
        """The flow at x_t (B, C, h, w) and t, () or (B,), given one encoded prompt a sample; w = 1 is one pass."""
        time = t.expand(len(x_t)).to(x_t)
        if guidance_scale == 1:
            return Prediction(self._flow(role, x_t, time, condition), "flow", x_t, t, self.process)
        null = self.unconditional.expand(len(x_t))
        tokens, pooled = torch.cat([null.tokens, condition.tokens]), torch.cat([null.pooled, condition.pooled])
        both = Condition(tokens, pooled, condition.weight)
        uncond, cond = self._flow(role, x_t.repeat(2, 1, 1, 1), time.repeat(2), both).chunk(2)
        return Prediction(guided(cond, uncond, guidance_scale), "flow", x_t, t, self.process)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), float32 in [0, 1]."""
        vae = self.pipe.vae
        with self._autocast():
            images = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp_(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of pictures (B, 3, H, W) in [0, 1]: the mean of the auto-encoder's posterior."""
        vae = self.pipe.vae
        with self._autocast():
            mean = vae.encode(images.to(self.device) * 2 - 1).latent_dist.mean
        return (mean.float() - vae.config.shift_factor) * vae.config.scaling_factor

    def export(self, folder: Path, role: str) -> None:
        """A LoRA as stock diffusers and as PEFT load it, rank and alpha included; full weights as a pipeline."""
        if self.roles.lora is None:
            own = {self.NETWORK: self.roles.module(role)}
            self.PIPELINE(**(self.pipe.components | own)).save_pretrained(folder)
            return
        state, config = self.roles.lora_state(role), self.roles.lora.peft_config()
        state = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
        self.PIPELINE.save_lora_weights(
            folder, transformer_lora_layers=state, transformer_lora_adapter_metadata=config.to_dict()
        )
        save_file({f"base_model.model.{name}": t for name, t in state.items()}, folder / "adapter_model.safetensors")
        config.save_pretrained(folder)

    def _flow(self, role: str, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        weight = {} if condition.weight is None else {"log_weight": condition.weight.log()}
        with self._autocast():
            return self.roles(
                role,
                hidden_states=x_t,
                timestep=self.process.timestep(time),
                encoder_hidden_states=condition.tokens,
                pooled_projections=condition.pooled,
                joint_attention_kwargs=weight,
                return_dict=False,
            )[0].float()

    def _autocast(self) -> torch.autocast:
        """A new region for every forward: a longer one would keep casts of weights that have changed since."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def _folded(self) -> Tensor | None:
        """What each text token counts for (L,) where T5's all are one; None where they may differ.

        T5's tokens come last, and are one over and over if there is no T5 or if its vocabulary is a single word.
        """
        t5 = self.pipe.text_encoder_3
        if t5 is not None and t5.config.vocab_size > 1:
            return None
        return torch.tensor([1.0] * self.pipe.tokenizer_max_length + [MAX_TEXT_TOKENS], device=self.device)


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
        bias = F.pad(log_weight, (num_pixels, 0)).to(value)[None, None, None] if counted else None  # (1, 1, 1, N + L)
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
