"""Plain statistics of pictures, to see a drift of the look that no reward measures.

A reward that cares for one thing lets everything else go: text rewards blank the background (dark share 0.45 -> 0.93,
colour entropy 4.0 -> 1.8 in one published run, Tencent-Hunyuan/UniRL #407), preference rewards over-saturate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode "L"
DARK_BELOW = 0.15  # luma; the threshold of UniRL #407
EDGE_ABOVE = 0.1  # change of luma per pixel
LEVELS = 8  # bins per channel, so 512 colours and at most 9 bits


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """Five float32 (B,) from images (B, 3, H, W) in [0, 1].

    brightness: mean luma. dark_share: share of pixels with luma below 0.15. saturation: mean of HSV saturation.
    edge_density: share of pixels where luma changes by more than 0.1 per pixel (Sobel).
    color_entropy: bits, of the histogram over 8 x 8 x 8 colours.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"expected float images (B, 3, H, W) in [0, 1]; got {images.dtype} {tuple(images.shape)}")
    images = images.float()
    luma = torch.einsum("bchw,c->bhw", images, images.new_tensor(LUMA))  # (B, H, W)
    brightest, faintest = images.amax(dim=1), images.amin(dim=1)  # (B, H, W)
    return {
        "brightness": luma.mean(dim=(1, 2)),
        "dark_share": (luma < DARK_BELOW).float().mean(dim=(1, 2)),
        "saturation": ((brightest - faintest) / brightest.clamp_min(1e-6)).mean(dim=(1, 2)),
        "edge_density": (_slope(luma) > EDGE_ABOVE).float().mean(dim=(1, 2)),
        "color_entropy": _color_entropy(images),
    }


def _slope(luma: Tensor) -> Tensor:
    """Length of the Sobel gradient (B, H, W), luma per pixel; the border repeats, so a flat picture has no edge."""
    padded = F.pad(luma.unsqueeze(1), (1, 1, 1, 1), mode="replicate").squeeze(1)  # (B, H + 2, W + 2)
    across = padded[:, :, 2:] - padded[:, :, :-2]  # (B, H + 2, W), over two pixels
    down = padded[:, 2:] - padded[:, :-2]  # (B, H, W + 2)
    across = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]  # (B, H, W), each row with its neighbours
    down = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]  # (B, H, W)
    return torch.hypot(across, down) / 8


def _color_entropy(images: Tensor) -> Tensor:
    batch, colors = len(images), LEVELS**3
    level = (images * LEVELS).long().clamp(0, LEVELS - 1)  # (B, 3, H, W)
    color = (level[:, 0] * LEVELS + level[:, 1]) * LEVELS + level[:, 2]  # (B, H, W)
    first = torch.arange(batch, device=images.device).view(-1, 1, 1) * colors  # each image counts in its own bins
    share = (color + first).flatten().bincount(minlength=batch * colors).view(batch, colors).float()
    share = share / share.sum(dim=1, keepdim=True)
    return -torch.xlogy(share, share).sum(dim=1) / torch.log(share.new_tensor(2.0))
