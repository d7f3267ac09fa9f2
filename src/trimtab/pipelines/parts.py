"""What every face does in the same way, written once: prompts remembered, guidance, pictures, weights on disk."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.batch import Condition
from trimtab.roles import Roles
from trimtab.solvers import guided


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A new region for every forward: a longer one would keep casts of weights that have changed since."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def leave_casts_to_autocast(network: nn.Module, precision: torch.dtype) -> None:
    """In half precision PEFT would cast a LoRA's input up, for autocast to cast it down again."""
    for module in network.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = precision == torch.float32


def latent_shape(pipe: DiffusionPipeline, network: nn.Module, resolution: int) -> tuple[int, int, int]:
    """Channels, height and width of the latents of a square picture, `resolution` pixels a side."""
    side = resolution // pipe.vae_scale_factor
    return network.config.in_channels, side, side


def remembered(
    memory: dict[str, Condition], texts: Sequence[str], embed: Callable[[Sequence[str]], Condition]
) -> Condition:
    """The condition of P prompts; those that are not in `memory` yet are embedded, each distinct one once."""
    new = [text for text in dict.fromkeys(texts) if text not in memory]
    if new:
        condition = embed(new)
        memory.update({text: condition[i : i + 1] for i, text in enumerate(new)})
    return joined([memory[text] for text in texts])


def joined(conditions: Sequence[Condition]) -> Condition:
    """One condition after the other; what their tokens count for is taken from the last."""
    last = conditions[-1]
    pooled = None if last.pooled is None else torch.cat([each.pooled for each in conditions])
    return replace(last, tokens=torch.cat([each.tokens for each in conditions]), pooled=pooled)


def guided_output(
    output: Callable[[Tensor, Tensor, Condition], Tensor],
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    unconditional: Condition,
    scale: float,
) -> Tensor:
    """What a network says (B, C, h, w) at x_t and t (B,), given one encoded prompt a sample; w = 1 is one pass."""
    if scale == 1:
        return output(x_t, t, condition)
    both = joined([unconditional.expand(len(x_t)), condition])
    uncond, cond = output(x_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
    return guided(cond, uncond, scale)


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W), float32 in [0, 1]."""
    images = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0), return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp_(0, 1)


def posterior(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, C, h, w) of the latents of pictures (B, 3, H, W) in [0, 1]."""
    found = vae.encode(images.to(vae.device) * 2 - 1).latent_dist
    mean = (found.mean.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return mean, found.std.float() * vae.config.scaling_factor


def export(pipe: DiffusionPipeline, network: str, roles: Roles, folder: Path, role: str) -> None:
    """A LoRA as stock diffusers and as PEFT load it, rank and alpha included; full weights as a pipeline."""
    if roles.lora is None:
        pipe.save_pretrained(folder)
        if roles.module(role) is not getattr(pipe, network):
            roles.module(role).save_pretrained(folder / network)
        return
    state, config = roles.lora_state(role), roles.lora.peft_config()
    state = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    layers = {f"{network}_lora_layers": state, f"{network}_lora_adapter_metadata": config.to_dict()}
    pipe.save_lora_weights(folder, **layers)
    save_file({f"base_model.model.{name}": t for name, t in state.items()}, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
