"""The world of the demo model: coloured shapes on coloured grounds, and the sentences that describe them.

A `Scene` says everything about a picture; `render` draws it (64x64 RGB, drawn four times larger and averaged, so
edges are smooth) and `caption` describes it. Both are pure functions, so a seed is a data set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from library.streams import python_stream

SIZE = 64
OVERSAMPLING = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 44),
    "orange": (246, 140, 28),
    "yellow": (250, 214, 48),
    "green": (44, 158, 72),
    "teal": (36, 186, 178),
    "blue": (40, 84, 208),
    "purple": (132, 56, 176),
    "pink": (246, 138, 184),
    "brown": (126, 78, 42),
    "black": (24, 24, 28),
    "grey": (148, 150, 156),
    "white": (250, 250, 248),
}

Polygon = np.ndarray
# One outline and whether it adds to the shape or cuts from it; later parts are drawn over earlier ones.
Part = tuple[Polygon, bool]


def ellipse(x: float, y: float, rx: float, ry: float | None = None, *, start: float = 0, end: float = 360) -> Polygon:
    """Points of an ellipse or, between two angles in degrees, of a sector's arc; y points down."""
    angles = np.radians(np.linspace(start, end, 73))
    return np.stack([x + rx * np.cos(angles), y + (ry or rx) * np.sin(angles)], axis=1)


def regular(corners: int, *, radius: float = 1.0, turn: float = -90.0) -> Polygon:
    """A regular polygon around the origin; `turn` is the angle of its first corner in degrees."""
    angles = np.radians(turn + 360.0 * np.arange(corners) / corners)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def polygon(*points: tuple[float, float]) -> Polygon:
    """A polygon from its corners."""
    return np.array(points, dtype=np.float64)


def _star() -> list[Part]:
    outer, inner = regular(5, radius=1.12), regular(5, radius=0.5, turn=-54)
    return [(np.stack([outer, inner], axis=1).reshape(-1, 2) + [0, 0.08], True)]


def _heart() -> list[Part]:
    t = np.linspace(0, 2 * np.pi, 97)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(np.stack([x / 16, -(y + 2.5) / 15.5], axis=1), True)]


def _drop() -> list[Part]:
    return [(ellipse(0, 0.32, 0.68), True), (polygon((0, -1.1), (0.62, 0.05), (-0.62, 0.05)), True)]


def _flower() -> list[Part]:
    petals = [(ellipse(x, y, 0.42), True) for x, y in regular(5, radius=0.62)]
    return [*petals, (regular(5, radius=0.6), True), (ellipse(0, 0, 0.24), False)]


def _cloud() -> list[Part]:
    puffs = [(-0.62, 0.2, 0.42), (-0.1, -0.2, 0.56), (0.55, 0.1, 0.48)]
    base = polygon((-0.62, 0.2), (0.55, 0.1), (0.6, 0.58), (-0.62, 0.62))
    return [*((ellipse(*puff), True) for puff in puffs), (base, True)]


def _house() -> list[Part]:
    walls = polygon((-0.72, -0.1), (0.72, -0.1), (0.72, 0.95), (-0.72, 0.95))
    door = polygon((-0.2, 0.35), (0.2, 0.35), (0.2, 0.95), (-0.2, 0.95))
    return [(polygon((0, -1.0), (1.05, -0.05), (-1.05, -0.05)), True), (walls, True), (door, False)]


def _fish() -> list[Part]:
    tail = polygon((0.35, 0), (1.08, -0.62), (1.08, 0.62))
    return [(ellipse(-0.22, 0, 0.84, 0.6), True), (tail, True), (ellipse(-0.6, -0.14, 0.13), False)]


def _tree() -> list[Part]:
    trunk = polygon((-0.18, 0.5), (0.18, 0.5), (0.18, 1.05), (-0.18, 1.05))
    lower = polygon((0, -0.5), (0.85, 0.6), (-0.85, 0.6))
    return [(trunk, True), (lower, True), (polygon((0, -1.08), (0.62, 0.0), (-0.62, 0.0)), True)]


def _mushroom() -> list[Part]:
    stem = polygon((-0.3, 0.0), (0.3, 0.0), (0.38, 0.95), (-0.38, 0.95))
    return [(stem, True), (ellipse(0, 0.1, 1.0, 1.0, start=180, end=360), True)]


def _arrow() -> list[Part]:
    shaft = polygon((-1.05, -0.3), (0.1, -0.3), (0.1, 0.3), (-1.05, 0.3))
    return [(shaft, True), (polygon((0.0, -0.85), (1.05, 0.0), (0.0, 0.85)), True)]


def _crown() -> list[Part]:
    points = [(-1, 0.8), (-1, -0.65), (-0.48, 0.05), (0, -0.85), (0.48, 0.05), (1, -0.65), (1, 0.8)]
    return [(polygon(*points), True)]


def _cross() -> list[Part]:
    upright = polygon((-0.36, -1), (0.36, -1), (0.36, 1), (-0.36, 1))
    return [(upright, True), (upright[:, ::-1], True)]


SHAPES: dict[str, Callable[[], list[Part]]] = {
    "circle": lambda: [(ellipse(0, 0, 1), True)],
    "square": lambda: [(regular(4, radius=1.25, turn=45), True)],
    "triangle": lambda: [(regular(3, radius=1.2) + [0, 0.25], True)],
    "diamond": lambda: [(polygon((0, -1.15), (0.8, 0), (0, 1.15), (-0.8, 0)), True)],
    "hexagon": lambda: [(regular(6, radius=1.08, turn=0), True)],
    "star": _star,
    "heart": _heart,
    "ring": lambda: [(ellipse(0, 0, 1.05), True), (ellipse(0, 0, 0.55), False)],
    "cross": _cross,
    "moon": lambda: [(ellipse(0, 0, 1.05), True), (ellipse(0.5, -0.15, 0.85), False)],
    "drop": _drop,
    "flower": _flower,
    "cloud": _cloud,
    "house": _house,
    "fish": _fish,
    "tree": _tree,
    "mushroom": _mushroom,
    "arrow": _arrow,
    "crown": _crown,
    "bolt": lambda: [
        (polygon((0.25, -1.15), (-0.75, 0.2), (-0.1, 0.2), (-0.3, 1.15), (0.75, -0.3), (0.1, -0.3), (0.6, -1.15)), True)
    ],
}

TEXTURES = ("plain", "striped", "dotted", "checked", "outlined")
# Name, horizontal and vertical place of the centre as a share of the room the shape leaves (-1 .. 1).
PLACES: dict[str, tuple[float, float]] = {
    "": (0, 0),
    "on the left": (-0.85, 0),
    "on the right": (0.85, 0),
    "at the top": (0, -0.85),
    "at the bottom": (0, 0.85),
}
# Radius in pixels, lowest and highest.
SIZES: dict[str, tuple[float, float]] = {"small": (11.5, 14.0), "": (15.0, 20.0), "large": (21.5, 25.5)}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One shape in a picture: centre and radius are in pixels; `second` colours the texture."""

    shape: str
    colour: str
    x: float = SIZE / 2
    y: float = SIZE / 2
    radius: float = 20.0
    texture: str = "plain"
    second: str = "black"
    size_word: str = ""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture: one or two things on a ground; `relation` joins two ("and", "inside"), `place` tells where one is."""

    things: tuple[Thing, ...]
    background: str
    ground: str = "plain"
    ground_second: str = "white"
    relation: str = "and"
    place: str = ""


def shape_mask(parts: Sequence[Part], x: float, y: float, radius: float) -> np.ndarray:
    """A shape drawn at `OVERSAMPLING` times the picture's size: uint8 (256, 256), 0 or 255."""
    side = SIZE * OVERSAMPLING
    mask = np.zeros((side, side), dtype=np.uint8)
    for points, adds in parts:
        corners = np.rint((points * radius + [x, y]) * OVERSAMPLING).astype(np.int32)
        cv2.fillPoly(mask, [corners], 255 if adds else 0)
    return mask


def shrink(mask: np.ndarray) -> np.ndarray:
    """An oversampled mask as coverage per pixel: float32 (64, 64) in 0 .. 1."""
    return cv2.resize(mask, (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(np.float32) / 255.0


def _pattern(texture: str, x: float, y: float) -> np.ndarray:
    """The second colour's share of a texture at full size, anchored at a point so that it moves with the shape."""
    side = SIZE * OVERSAMPLING
    rows, columns = np.ogrid[:side, :side]
    down, right = rows / OVERSAMPLING - y, columns / OVERSAMPLING - x
    if texture == "striped":
        on = np.broadcast_to((down + 2.5) % 10 < 5, (side, side))
    elif texture == "checked":
        on = (np.floor(down / 7) + np.floor(right / 7)) % 2 == 0
    else:
        on = (down % 10 - 5) ** 2 + (right % 10 - 5) ** 2 < 2.8**2
    return on.astype(np.uint8) * 255


def _outline(mask: np.ndarray) -> np.ndarray:
    width = int(2.6 * OVERSAMPLING) | 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width - 1, 2 * width - 1))
    # A frame of nothing around the picture lets a cut-off shape keep its outline along the edge.
    inside = cv2.erode(mask, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=(0,))
    return mask & np.bitwise_not(inside)


def paint(canvas: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Lay a colour over a float32 (64, 64, 3) canvas where an oversampled mask covers it."""
    share = shrink(mask)[..., None]
    canvas += share * (np.array(colour, dtype=np.float32) - canvas)


def render_thing(canvas: np.ndarray, thing: Thing) -> None:
    """Draw one thing over a canvas."""
    mask = shape_mask(SHAPES[thing.shape](), thing.x, thing.y, thing.radius)
    paint(canvas, mask, COLOURS[thing.colour])
    if thing.texture == "outlined":
        paint(canvas, _outline(mask), COLOURS[thing.second])
    elif thing.texture != "plain":
        paint(canvas, mask & _pattern(thing.texture, thing.x, thing.y), COLOURS[thing.second])


def render_ground(background: str, ground: str = "plain", second: str = "white") -> np.ndarray:
    """An empty canvas: float32 (64, 64, 3), 0 .. 255."""
    canvas = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    canvas[:] = COLOURS[background]
    if ground != "plain":
        paint(canvas, _pattern(ground, SIZE / 2, SIZE / 2), COLOURS[second])
    return canvas


def to_picture(canvas: np.ndarray) -> np.ndarray:
    """A canvas rounded to uint8."""
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene: uint8 RGB (64, 64, 3)."""
    canvas = render_ground(scene.background, scene.ground, scene.ground_second)
    for thing in scene.things:
        render_thing(canvas, thing)
    return to_picture(canvas)


def article(words: str) -> str:
    """Words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe(thing: Thing) -> str:
    """A thing in words: "a large red ring with white stripes"."""
    ending = {
        "plain": "",
        "outlined": f" with {article(thing.second)} outline",
        "striped": f" with {thing.second} stripes",
        "dotted": f" with {thing.second} dots",
        "checked": f" with {thing.second} checks",
    }[thing.texture]
    return article(" ".join(filter(None, (thing.size_word, thing.colour, thing.shape)))) + ending


def describe_ground(background: str, ground: str = "plain", second: str = "white") -> str:
    """A ground in words: "on a blue background"."""
    if ground == "plain":
        return f"on {article(background)} background"
    return f"on {article(ground)} {background} and {second} background"


def caption(scene: Scene) -> str:
    """A scene in words."""
    # What is drawn last lies on top, but the sentence names the inner thing first.
    order = scene.things[::-1] if scene.relation == "inside" else scene.things
    things = f" {scene.relation} ".join(describe(thing) for thing in order)
    return " ".join(
        filter(None, (things, scene.place, describe_ground(scene.background, scene.ground, scene.ground_second)))
    )


def _other(rng: np.random.Generator, *taken: str) -> str:
    return str(rng.choice([name for name in COLOURS if name not in taken]))


def _draw_single(rng: np.random.Generator, background: str) -> tuple[Thing, str]:
    colour = _other(rng, background)
    texture = str(rng.choice(TEXTURES, p=(0.62, 0.08, 0.08, 0.06, 0.16)))
    size_word = str(rng.choice(list(SIZES), p=(0.16, 0.42, 0.42)))
    radius = float(rng.uniform(*SIZES[size_word]))
    place = "" if size_word == "large" else str(rng.choice(list(PLACES), p=(0.6, 0.1, 0.1, 0.1, 0.1)))
    room = SIZE / 2 - radius - 2
    jitter = rng.uniform(-1, 1, 2) * min(room, 3.5)
    x, y = SIZE / 2 + np.array(PLACES[place]) * room + jitter
    thing = Thing(
        shape=str(rng.choice(list(SHAPES))),
        colour=colour,
        x=float(x),
        y=float(y),
        radius=radius,
        texture=texture,
        second=_other(rng, colour, background),
        size_word=size_word,
    )
    return thing, place


def _draw_pair(rng: np.random.Generator, background: str) -> tuple[tuple[Thing, Thing], str]:
    colours = (first := _other(rng, background)), _other(rng, background, first)
    shapes = rng.choice(list(SHAPES), 2)
    if rng.random() < 0.4:
        outer_shape = str(rng.choice(["circle", "square", "hexagon", "heart"]))
        outer = Thing(shape=outer_shape, colour=colours[1], radius=float(rng.uniform(23, 26)), size_word="large")
        inner = Thing(shape=str(shapes[0]), colour=colours[0], radius=float(rng.uniform(9.5, 12)), size_word="small")
        return (outer, inner), "inside"
    spots = [(17.0, 32.0), (47.0, 32.0)]
    jitters = rng.uniform(-1.5, 1.5, (2, 2))
    left, right = (
        Thing(shape=str(shape), colour=colour, x=x + dx, y=y + dy, radius=float(rng.uniform(11.5, 13.5)))
        for shape, colour, (x, y), (dx, dy) in zip(shapes, colours, spots, jitters, strict=True)
    )
    return (left, right), "and"


def random_scene(rng: np.random.Generator) -> Scene:
    """One scene of the training set."""
    background = str(rng.choice(list(COLOURS)))
    if rng.random() < 0.15:
        things, relation = _draw_pair(rng, background)
        return Scene(things=things, background=background, relation=relation)
    thing, place = _draw_single(rng, background)
    ground, second = "plain", "white"
    if rng.random() < 0.1:
        ground = str(rng.choice(("striped", "dotted", "checked")))
        second = _other(rng, background, thing.colour, thing.second)
    return Scene(things=(thing,), background=background, ground=ground, ground_second=second, place=place)


def random_doodle(rng: np.random.Generator) -> np.ndarray:
    """A picture without a caption, for the autoencoder alone: outlined blobs with dots, bars and polygons on top.

    It teaches the autoencoder small parts, thick lines and many colours side by side, which captioned scenes lack.
    """
    canvas = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    canvas[:] = _any_colour(rng)
    for _ in range(int(rng.integers(2, 9))):
        x, y = rng.uniform(4, SIZE - 4, 2)
        radius = float(rng.choice((4.0, 7.0, 12.0, 20.0)) * rng.uniform(0.7, 1.4))
        mask = shape_mask(_random_parts(rng), float(x), float(y), radius)
        paint(canvas, mask, _any_colour(rng))
        if radius > 6 and rng.random() < 0.4:
            paint(canvas, _outline(mask), _any_colour(rng))
    return to_picture(canvas)


def _any_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    if rng.random() < 0.7:
        return COLOURS[str(rng.choice(list(COLOURS)))]
    red, green, blue = rng.integers(0, 256, 3)
    return int(red), int(green), int(blue)


def _random_parts(rng: np.random.Generator) -> list[Part]:
    kind = rng.random()
    if kind < 0.5:
        return [(ellipse(0, 0, 1.0, float(rng.uniform(0.5, 1.0))), True)]
    if kind < 0.7:
        return SHAPES[str(rng.choice(list(SHAPES)))]()
    angle = rng.uniform(0, np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    width = float(rng.uniform(0.15, 0.8))
    return [(polygon((-1.3, -width), (1.3, -width), (1.3, width), (-1.3, width)) @ turn, True)]


def draw_set(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Pictures, uint8 (count, 64, 64, 3), and their captions; picture i depends on (seed, i) alone."""
    pictures = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    captions = []
    for index in range(count):
        scene = random_scene(np.random.default_rng((seed, index)))
        pictures[index] = render(scene)
        captions.append(caption(scene))
    return pictures, captions


def draw_doodles(count: int, seed: int) -> np.ndarray:
    """Doodles for the autoencoder: uint8 (count, 64, 64, 3)."""
    return np.stack([random_doodle(np.random.default_rng((seed, index))) for index in range(count)])


def contact_sheet(pictures: np.ndarray, columns: int, scale: int = 3) -> np.ndarray:
    """Pictures of one size in rows, enlarged without smoothing, white lines between: uint8 RGB."""
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    rows = -(-len(padded) // columns)
    blank = np.full((rows * columns - len(padded), *padded.shape[1:]), 255, dtype=np.uint8)
    grid = np.concatenate([padded, blank]).reshape(rows, columns, *padded.shape[1:])
    sheet = grid.transpose(0, 2, 1, 3, 4).reshape(rows * padded.shape[1], columns * padded.shape[2], 3)
    return sheet.repeat(scale, axis=0).repeat(scale, axis=1)


def write_regularisation(folder: Path) -> int:
    """One large drawing of every shape with its caption, which keep the shapes as they are in the demo's training.

    Returns:
        How many were written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, shape in enumerate(SHAPES, start=1):
        colour, background = python_stream(1, "regularisation", number).sample(list(COLOURS), 2)
        scene = Scene(things=(Thing(shape=shape, colour=colour, radius=22.5, size_word="large"),), background=background)
        stem = folder / f"{number:02d}_{shape}"
        Image.fromarray(render(scene)).save(stem.with_suffix(".png"), optimize=True)
        stem.with_suffix(".txt").write_text(caption(scene) + "\n")
    return len(SHAPES)
