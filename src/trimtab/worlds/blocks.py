"""Blocks: drawn scenes of coloured shapes, with prompts and facts in GenEval's own JSONL schema.

A scene is a handful of `Block`s on a soft background, 64 x 64 px. Every shape is a signed distance field (negative
inside, in units of the block's radius), so one bilinear lookup draws it anti-aliased at any place, size and angle:
coverage = clip(1/2 - radius * sdf, 0, 1). The six tags are GenEval's: single_object, two_object, counting, colors,
position, color_attr. Train and test prompts differ in *content* (which shapes, colours, numbers, relations), and a
content and its mirror image ("a left of b", "b right of a") always lie on the same side.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt
from torch import Tensor

SIZE_PX = 64
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
COLORS = {
    "red": (222, 54, 58),
    "orange": (243, 142, 40),
    "yellow": (248, 212, 56),
    "green": (52, 164, 88),
    "blue": (52, 108, 222),
    "purple": (136, 74, 196),
    "pink": (244, 128, 182),
    "black": (44, 44, 52),
}
NUMBERS = {"two": 2, "three": 3, "four": 4}
MIRROR = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OPENINGS = ("a photo of", "a picture of", "a drawing of", "a painting of")

TEST_SHARE = {"single_object": 0.5, "counting": 1 / 3}  # the small tags give more to the test split; others 1/4
RADIUS_PX = {1: (10.0, 14.5), 2: (9.0, 12.5), 3: (8.0, 10.5), 4: (7.5, 9.5)}  # by number of blocks in the scene
GAP_PX = 3.0
FIELD_PX = 128  # resolution of a shape's stored distance field
FIELD_EXTENT = 1.5  # the field covers [-1.5, 1.5] radii


@dataclass(frozen=True)
class Block:
    """One shape in a scene; the centre and radius are in pixels, y grows downwards."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    blocks: tuple[Block, ...]
    top: tuple[float, float, float]  # background colour at the upper edge, in [0, 1]
    bottom: tuple[float, float, float]


# ---- prompts


def contents(tag: str) -> list[dict]:
    """Every content of a tag as {"tag", "include", "exclude"}, without an opening."""
    if tag == "single_object":
        return [_content(tag, {"class": s, "count": 1}) for s in SHAPES]
    if tag == "counting":
        return [
            _content(tag, {"class": s, "count": n}) | {"exclude": [{"class": s, "count": n + 1}]}
            for n in NUMBERS.values()
            for s in SHAPES
        ]
    if tag == "colors":
        return [_content(tag, {"class": s, "count": 1, "color": c}) for s in SHAPES for c in COLORS]
    pairs = list(itertools.permutations(SHAPES, 2))
    if tag == "two_object":
        return [_content(tag, {"class": a, "count": 1}, {"class": b, "count": 1}) for a, b in pairs]
    if tag == "position":  # as in GenEval the second noun is the target, clause 0
        return [
            _content(tag, {"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]})
            for a, b in pairs
            for relation in MIRROR
        ]
    if tag == "color_attr":
        return [
            _content(tag, {"class": a, "count": 1, "color": c}, {"class": b, "count": 1, "color": d})
            for a, b in pairs
            for c, d in itertools.permutations(COLORS, 2)
        ]
    raise ValueError(f"tag {tag!r} is not one of {', '.join(TAGS)}")


def _content(tag: str, *include: dict) -> dict:
    return {"tag": tag, "include": list(include)}


def phrase(content: dict) -> str:
    """The words for a content in GenEval's templates, without an opening: "two stars", "a red ring and a blue star"."""
    include, tag = content["include"], content["tag"]
    if tag == "counting":
        number = next(word for word, n in NUMBERS.items() if n == include[0]["count"])
        noun = include[0]["class"]
        return f"{number} {noun}es" if noun.endswith("s") else f"{number} {noun}s"
    nouns = [" ".join(filter(None, (clause.get("color"), clause["class"]))) for clause in include]
    nouns = [f"an {noun}" if noun[0] in "aeiou" else f"a {noun}" for noun in nouns]
    if tag == "position":
        return f"{nouns[1]} {include[1]['position'][0]} {nouns[0]}"
    return " and ".join(nouns)


def _key(content: dict) -> str:
    """The same for a content and its mirror image."""
    include = content["include"]
    if content["tag"] == "position":
        (b, a), relation = include, include[1]["position"][0]
        first, second = (a, b) if relation in ("left of", "above") else (b, a)
        return f"{first['class']} {min(relation, MIRROR[relation])} {second['class']}"
    return " + ".join(sorted(f"{c['count']} {c.get('color')} {c['class']}" for c in include))


@cache
def _test_keys(tag: str) -> frozenset[str]:
    keys = sorted({_key(content) for content in contents(tag)})
    order = np.random.default_rng([2026, TAGS.index(tag)]).permutation(len(keys))
    return frozenset(keys[i] for i in order[: round(len(keys) * TEST_SHARE.get(tag, 0.25))])


def prompts(split: str, num_per_tag: int) -> list[dict]:
    """GenEval JSONL lines of a split, "train" or "test", `num_per_tag` a tag, the same at every call.

    The test split never repeats a line, so a tag with fewer lines gives fewer; the train split repeats the lines of
    the small tags so that all tags weigh the same.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} is not 'train' or 'test'")
    lines = []
    for number, tag in enumerate(TAGS):
        side = [c for c in contents(tag) if (_key(c) in _test_keys(tag)) == (split == "test")]
        every = [c | {"prompt": f"{opening} {phrase(c)}"} for c in side for opening in OPENINGS]
        order = np.random.default_rng([2027, number]).permutation(len(every))
        wanted = num_per_tag if split == "train" else min(num_per_tag, len(every))
        lines += [every[order[i % len(every)]] for i in range(wanted)]
    return lines


@cache
def _facts_of_phrases() -> dict[str, dict]:
    return {phrase(content): content for tag in TAGS for content in contents(tag)}


@cache
def _telling_words() -> frozenset[str]:
    """Words that ask for something, or deny it: in front of a phrase they make it another."""
    words = {word for known in _facts_of_phrases() for word in known.split()}
    return frozenset(words - {"a", "an", "of"} | {"or", "not", "no", "without"})


def facts(text: str) -> dict | None:
    """The content that a sentence asks for, if it is one of this world's, however it opens; else None: a sentence that
    asks for more than that ("a red circle and two stars") has none."""
    words = text.lower().replace(".", " ").replace(",", " ").split()
    known = _facts_of_phrases()
    start = next((i for i in range(len(words)) if " ".join(words[i:]) in known), None)
    if start is None or not _telling_words().isdisjoint(words[:start]):
        return None
    return known[" ".join(words[start:])]


# ---- scenes


def can_draw(content: dict) -> bool:
    """Whether there are scenes of it: of at most four blocks, with no relation but that of the second to the first."""
    include = content["include"]
    counts, related = [clause["count"] for clause in include], [bool(clause.get("position")) for clause in include]
    alone = counts[:2] == [1, 1] and related[1] and include[1]["position"][1] == 0
    return sum(counts) in RADIUS_PX and (not any(related) or (alone and sum(related) == 1))


def scene(content: dict, rng: np.random.Generator) -> Scene:
    """A scene in which the content, one of which `can_draw`, is true and nothing else is there; unspecified colours are
    drawn at random."""
    wanted = [clause for clause in content["include"] for _ in range(clause["count"])]
    colors = [clause.get("color") or str(rng.choice(list(COLORS))) for clause in wanted]
    relation = next((clause["position"][0] for clause in content["include"] if clause.get("position")), None)
    radii = rng.uniform(*RADIUS_PX[len(wanted)], size=len(wanted))
    centres = _place(radii, relation, rng)
    angles = rng.uniform(-0.14, 0.14, size=len(wanted))
    blocks = tuple(
        Block(clause["class"], color, float(x), float(y), float(r), float(a))
        for clause, color, (x, y), r, a in zip(wanted, colors, centres, radii, angles, strict=True)
    )
    tint = 0.95 - 0.07 * rng.random(3)
    return Scene(blocks, tuple(tint.tolist()), tuple((tint - 0.05 * rng.random()).tolist()))


def _place(radii: np.ndarray, relation: str | None, rng: np.random.Generator) -> np.ndarray:
    """Centres (N, 2) by rejection: inside the frame, apart from each other, in the wanted relation."""
    edge = (radii + 2.0)[:, None]
    apart = radii[:, None] + radii[None, :] + GAP_PX
    upper = np.triu_indices(len(radii), 1)
    while True:
        centres = edge + (SIZE_PX - 2 * edge) * rng.random((len(radii), 2))
        distance = np.hypot(*(centres[:, None] - centres[None, :]).transpose(2, 0, 1))
        if (distance[upper] >= apart[upper]).all() and (relation is None or _related(centres, relation)):
            return centres


def _related(centres: np.ndarray, relation: str) -> bool:
    """Whether the second centre stands in `relation` to the first, well clear of the diagonal."""
    offset = centres[1] - centres[0]
    along, across = (0, 1) if relation in ("left of", "right of") else (1, 0)
    sign = -1 if relation in ("left of", "above") else 1
    return sign * offset[along] > 0 and abs(offset[across]) < 0.8 * abs(offset[along])


# ---- drawing


def outline(shape: str) -> np.ndarray:
    """The corners (N, 2) of a shape that fits the unit circle, y downwards. A ring's hole is not in its outline."""
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    if shape in ("circle", "ring"):
        return np.stack([np.cos(turn), np.sin(turn)], 1) * 0.95
    if shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
        return np.stack([x, y - 2.5], 1) / 16.5
    if shape == "cross":
        a, b = 0.34, 0.95
        quarter = np.array([(a, -b), (a, -a), (b, -a)])
        spin = [np.array([[np.cos(k), -np.sin(k)], [np.sin(k), np.cos(k)]]) for k in np.arange(4) * np.pi / 2]
        return np.concatenate([quarter @ matrix.T for matrix in spin])
    corners, depth, start = {
        "square": (4, None, np.pi / 4),
        "diamond": (4, None, 0.0),
        "triangle": (3, None, -np.pi / 2),
        "star": (5, 0.46, -np.pi / 2),
    }[shape]
    angle = start + np.arange(corners * (2 if depth else 1)) * (np.pi if depth else 2 * np.pi) / corners
    radius = np.where(np.arange(len(angle)) % 2 == 0, 1.08, 1.08 * (depth or 1.0))
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    moved = {"triangle": (0.0, 0.16)}.get(shape, (0.0, 0.0))  # to the middle of its circle
    return points * ((0.72, 1.0) if shape == "diamond" else 1.0) + np.array(moved)


@cache
def distance_fields() -> Tensor:
    """Signed distances (shapes, 1, F, F) in radii, negative inside, over [-FIELD_EXTENT, FIELD_EXTENT]^2."""
    fine = 4 * FIELD_PX
    fields = []
    for shape in SHAPES:
        picture = Image.new("1", (fine, fine))
        points = (outline(shape) / FIELD_EXTENT + 1) * fine / 2
        ImageDraw.Draw(picture).polygon([tuple(point) for point in points], fill=1)
        if shape == "ring":
            low, high = (fine / 2 * (1 - 0.5 / FIELD_EXTENT), fine / 2 * (1 + 0.5 / FIELD_EXTENT))
            ImageDraw.Draw(picture).ellipse([low, low, high, high], fill=0)
        inside = np.asarray(picture)
        field = (distance_transform_edt(~inside) - distance_transform_edt(inside)) * 2 * FIELD_EXTENT / fine
        fields.append(field.reshape(FIELD_PX, 4, FIELD_PX, 4).mean((1, 3)))
    return torch.from_numpy(np.stack(fields)[:, None]).float()


def draw(scenes: Sequence[Scene]) -> Tensor:
    """Pictures (B, 3, 64, 64), float32 in [0, 1], of the scenes."""
    ramp = torch.linspace(0, 1, SIZE_PX)[:, None]  # (H, 1)
    top, bottom = (torch.tensor([getattr(s, edge) for s in scenes])[:, :, None, None] for edge in ("top", "bottom"))
    canvas = (top + (bottom - top) * ramp).expand(-1, -1, -1, SIZE_PX).contiguous()  # (B, 3, H, W)
    for layer in range(max(len(s.blocks) for s in scenes)):
        here = [i for i, s in enumerate(scenes) if len(s.blocks) > layer]
        paint, cover = _paint([scenes[i].blocks[layer] for i in here])
        canvas[here] += cover * (paint - canvas[here])
    return canvas.clamp_(0, 1)


def _paint(blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """Colour (N, 3, H, W), lit from above with a darker rim, and coverage (N, 1, H, W) of one block a picture."""
    x, y, radius, angle = torch.tensor([(b.x, b.y, b.radius, b.angle) for b in blocks]).unbind(1)  # (N,) each
    centre = torch.arange(SIZE_PX) + 0.5
    dx = (centre[None, None, :] - x[:, None, None]) / radius[:, None, None]  # (N, 1, W)
    dy = (centre[None, :, None] - y[:, None, None]) / radius[:, None, None]  # (N, H, 1)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    grid = torch.stack([cos * dx + sin * dy, cos * dy - sin * dx], -1) / FIELD_EXTENT  # (N, H, W, 2)
    fields = distance_fields()[[SHAPES.index(b.shape) for b in blocks]]  # (N, 1, F, F)
    sdf_px = F.grid_sample(fields, grid, padding_mode="border", align_corners=False) * radius[:, None, None, None]
    color = torch.tensor([COLORS[b.color] for b in blocks])[:, :, None, None] / 255
    light = 1.0 - 0.10 * dy[:, None].clamp(-1, 1)  # (N, 1, H, 1)
    rim = 1.0 - 0.22 * (sdf_px + 2.0).clamp(0, 1)
    return color * light * rim, (0.5 - sdf_px).clamp(0, 1)
