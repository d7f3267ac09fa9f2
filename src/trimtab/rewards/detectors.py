"""Detectors: pictures in, `Detection`s out, for the scoring rules of `geneval.py`.

`read_blocks` is the exact reader of the world blocks. A picture is cut into connected pieces of foreground, everything
clearly unlike the colour of the picture's border. Each piece becomes a soft mask, is moved to its centroid and scaled
to unit area, and is compared with every shape so treated (intersection over union, sum of minima by sum of maxima):
the best match names it, and one that matches nothing is a "blob". Its colour is the nearest of the palette to the
piece's median. No learned part, so the verdict can't drift.
"""

from functools import cache

import numpy as np
from scipy.ndimage import find_objects, label, map_coordinates
from torch import Tensor

from trimtab.rewards.geneval import Detection
from trimtab.worlds.blocks import COLORS, SHAPES, SIZE_PX, Block, Scene, draw

BLOB = "blob"
CONTRAST = 0.10  # largest channel difference to the border's colour that still is background
MIN_AREA_PX = 12  # smaller pieces are noise
MIN_SIDE_PX = 9  # smaller pieces can't be read: the smallest block drawn is 11 px wide
MIN_OVERLAP = 0.80  # intersection over union below which a piece is a blob
MAX_COLOR_DISTANCE = 0.25
_WINDOW_PX = 24  # a normalised mask is _WINDOW_PX x _WINDOW_PX, and spans two square roots of the area
_SHADES = np.array([0.75, 0.85, 0.95, 1.05])  # a block is lit from above and has a darker rim


def read_blocks(images: Tensor) -> list[list[Detection]]:
    """Detections of every block in each picture of (B, 3, 64, 64), float in [0, 1]; what can't be read is a "blob"."""
    if images.ndim != 4 or images.shape[1:] != (3, SIZE_PX, SIZE_PX):
        raise ValueError(f"read_blocks takes images (B, 3, {SIZE_PX}, {SIZE_PX}), got {tuple(images.shape)}")
    return [_read(picture) for picture in images.detach().float().cpu().permute(0, 2, 3, 1).numpy()]


def _read(picture: np.ndarray) -> list[Detection]:
    """The detections in one picture (H, W, 3)."""
    background = _background(picture)
    pieces, _ = label(np.abs(picture - background).max(-1) > CONTRAST)
    found = []
    for number, (rows, columns) in enumerate(find_objects(pieces), start=1):
        mask = pieces[rows, columns] == number
        if mask.sum() < MIN_AREA_PX:
            continue
        pixels = picture[rows, columns]
        color = np.median(pixels[mask], 0)
        soft = _coverage(pixels, background, color) * mask
        shape = _shape(soft) if min(mask.shape) >= MIN_SIDE_PX else BLOB
        box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
        found.append(Detection(shape, 1.0, box, _color_name(color)))
    return found


def _background(picture: np.ndarray) -> np.ndarray:
    """The median colour (3,) of the picture's outermost two pixels."""
    sides = picture[2:-2, [0, 1, -2, -1]].reshape(-1, 3)
    return np.median(np.concatenate([picture[[0, 1, -2, -1]].reshape(-1, 3), sides]), 0)


def _coverage(pixels: np.ndarray, background: np.ndarray, color: np.ndarray) -> np.ndarray:
    """How much of each pixel (H, W, 3) -> (H, W) is the piece: its place between the two colours, in [0, 1]."""
    toward = color - background
    return np.clip((pixels - background) @ toward / (toward @ toward), 0, 1)


def _normalised(soft: np.ndarray) -> np.ndarray:
    """A soft mask (H, W) moved to its centroid, scaled to unit area and resampled, flat (_WINDOW_PX^2,)."""
    area = soft.sum()
    centre = [(np.arange(n) @ soft.sum(1 - axis)) / area for axis, n in enumerate(soft.shape)]
    steps = ((np.arange(_WINDOW_PX) + 0.5) / _WINDOW_PX - 0.5) * 2 * np.sqrt(area)
    at = np.meshgrid(*(c + steps for c in centre), indexing="ij")
    return map_coordinates(soft, at, order=1, mode="grid-constant").ravel().astype(np.float32)


@cache
def _templates() -> np.ndarray:
    """Every shape in two sizes and five angles, normalised like a piece: (shapes, 10, _WINDOW_PX^2)."""
    white = (1.0, 1.0, 1.0)
    poses = [(radius, angle) for radius in (8.0, 12.0) for angle in (-0.14, -0.07, 0.0, 0.07, 0.14)]
    blocks = [Block(s, "black", SIZE_PX / 2, SIZE_PX / 2, r, a) for s in SHAPES for r, a in poses]
    pictures = draw([Scene((block,), white, white) for block in blocks]).permute(0, 2, 3, 1).numpy()
    black = np.array(COLORS["black"]) / 255
    masks = [_normalised(_coverage(picture, np.ones(3), black)) for picture in pictures]
    return np.stack(masks).reshape(len(SHAPES), len(poses), -1)


def _shape(soft: np.ndarray) -> str:
    """The shape that overlaps the soft mask (H, W) best, or "blob" where none does well."""
    mask = _normalised(soft)
    smaller, larger = np.minimum(_templates(), mask), np.maximum(_templates(), mask)
    overlap = (smaller.sum(-1) / larger.sum(-1)).max(-1)  # (shapes,)
    return SHAPES[overlap.argmax()] if overlap.max() >= MIN_OVERLAP else BLOB


def _color_name(color: np.ndarray) -> str | None:
    """The palette's name for a colour (3,), or None where nothing is near."""
    palette = np.array(list(COLORS.values())) / 255
    distance = np.linalg.norm(_SHADES[:, None, None] * palette - color, axis=-1).min(0)  # (colours,)
    return list(COLORS)[distance.argmin()] if distance.min() < MAX_COLOR_DISTANCE else None
