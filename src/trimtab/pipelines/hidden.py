"""What goes on inside a denoising network while it runs, heard by hooks: GANs judge by it, and DrPO compares by it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trimtab.errors import UserError


class _Enough(Exception):
    """All has been heard."""


def heard(network: nn.Module, places: Sequence[nn.Module], call: Callable[[], object]) -> list[Tensor]:
    """What comes out of these modules of a network (B, C, h, w), given in the order in which they run, while `call`
    calls it. The network is left after the last of them, where nothing is spent on what nobody hears."""
    found: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda _, inputs, output: found.append(as_picture(output))) for m in places]
    if not _checkpoints_blocks(network):
        hooks.append(_after(network, places[-1]).register_forward_pre_hook(_leave))
    try:
        call()
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _leave(*_) -> None:
    raise _Enough


def _after(network: nn.Module, place: nn.Module) -> nn.Module:
    """The stage that runs next."""
    blocks = _blocks(network)
    if blocks:
        stages = [*blocks, network.norm_out]
    else:
        stages = [*network.down_blocks, network.mid_block, *network.up_blocks, network.conv_out]
    return stages[stages.index(place) + 1]


def _checkpoints_blocks(network: nn.Module) -> bool:
    """Whether stages run within checkpoints, which nothing may leave: a transformer's do, a UNet has them inside."""
    return torch.is_grad_enabled() and bool(_blocks(network)) and network.is_gradient_checkpointing


def _blocks(network: nn.Module) -> list[nn.Module]:
    """A transformer's, in their order: FLUX has such with two streams first, and then such with one."""
    return [*getattr(network, "transformer_blocks", ()), *getattr(network, "single_transformer_blocks", ())]


def middle(network: nn.Module) -> nn.Module:
    """The module in the middle of a network; UserError where it is not known."""
    blocks = _blocks(network)
    if blocks:
        return blocks[(len(blocks) - 1) // 2]
    if getattr(network, "mid_block", None) is not None:
        return network.mid_block
    raise UserError(
        f"a {type(network).__name__} has no middle that a GAN could judge by; leave method.gan_weight at 0."
    )


def around_the_middle(network: nn.Module) -> dict[str, nn.Module]:
    """Three places by name: of a UNet the third stage down, the middle and the first stage up; of an MMDiT the blocks
    after a quarter, half and three quarters of all. UserError for another kind of network."""
    blocks = _blocks(network)
    if blocks:
        places = {f"block_{number}": number for number in (len(blocks) * part // 4 for part in (1, 2, 3))}
        return {name: blocks[number] for name, number in places.items()}
    if getattr(network, "mid_block", None) is not None:
        down, up = network.down_blocks, network.up_blocks
        return {"down": down[min(2, len(down) - 1)], "middle": network.mid_block, "up": up[0]}
    raise UserError(f"hidden states of a {type(network).__name__} are not known; give another method.features.kind.")


def as_picture(output: Tensor | tuple) -> Tensor:
    """Features of a UNet as they are; of an MMDiT's block (text, pixels) the pixels, put back on their grid."""
    if isinstance(output, Tensor):
        return output
    if output[0] is not None and output[0].ndim == 4:  # a UNet's stage and its skip connections
        return output[0]
    pixels = output[-1]  # (B, N, C); the last block of an MMDiT has no text left
    return pixels.mT.unflatten(2, (math.isqrt(pixels.shape[1]), -1))
