"""Rendering of one scene of the generated data set: textured shapes on a cluttered background.

Shapes of five classes overlap each other. Colour and texture are hints, but neither is sufficient: greyish
colours and uneven light blur the five hues, a class has its own texture only in most of its shapes, and the
clutter, which is background, has the same colours and textures.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from prcl_fast.data.random_streams import RandomStream, generator

CLASSES = ("background", "disc", "square", "triangle", "ring", "cross")


def render(height: int, width: int, seed: int, subset: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of a subset: image uint8 [H, W, 3] and class ids uint8 [H, W].

    The topmost shape is of class 1 + index mod 5, so that any five consecutive images show every class.
    """
    rng = generator(seed, RandomStream.SCENE, step=index, index=subset)
    image = _background(rng, height, width)
    label = np.zeros((height, width), dtype=np.uint8)
    side = min(height, width)
    for _ in range(rng.integers(2, 6)):
        _paint_clutter(rng, image, side)
    classes = [int(class_id) for class_id in rng.integers(1, len(CLASSES), size=rng.integers(1, 5))]
    for class_id in [*classes, 1 + index % (len(CLASSES) - 1)]:
        _paint_shape(rng, image, label, class_id, side)
    return _photograph(rng, image), label


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[H, W, 3] float32: two muted colours in slow waves, with a faint texture."""
    row, column = _grid(np.arange(height), np.arange(width))
    waves = np.zeros_like(row)
    for _ in range(3):
        angle, period, phase = rng.uniform(0, 2 * np.pi), _uniform(rng, 30, 90), _uniform(rng, 0, 2 * np.pi)
        along = row * np.float32(np.sin(angle)) + column * np.float32(np.cos(angle))
        waves += np.sin(along * np.float32(2 * np.pi) / period + phase)
    blend = (np.float32(0.5) + waves / 6)[..., None]
    first, second = _color(rng, rng.random(), 0.0), _color(rng, rng.random(), 0.0)
    image = np.float32(0.25) + np.float32(0.6) * (first * blend + second * (1 - blend))
    texture = _texture(rng, int(rng.integers(1, len(CLASSES))), row, column)
    return image * (1 + _uniform(rng, 0, 0.06) * texture[..., None])


def _paint_clutter(rng: np.random.Generator, image: np.ndarray, side: int) -> None:
    """A stroke or a long ellipse with colour and texture of a random class."""
    class_id = int(rng.integers(1, len(CLASSES)))
    if rng.random() < 0.7:
        half, thickness = _uniform(rng, 0.05, 0.22) * side, _uniform(rng, 0.8, 2.2)
        _paint(
            rng,
            image,
            class_id,
            half + thickness,
            lambda u, v: np.hypot(np.maximum(np.abs(u) - half, 0), v) - thickness,
        )
    else:
        half, ratio = _uniform(rng, 0.14, 0.22) * side, _uniform(rng, 0.35, 0.5)
        _paint(rng, image, class_id, half, lambda u, v: (np.hypot(u, v / ratio) - half) * ratio)


def _paint_shape(
    rng: np.random.Generator, image: np.ndarray, label: np.ndarray, class_id: int, side: int
) -> None:
    radius, stretch = _uniform(rng, 0.16, 0.3) * side, np.sqrt(_uniform(rng, 0.8, 1.25))
    shrink = min(stretch, 1 / stretch)
    shape = _DISTANCES[class_id - 1]
    window, inside = _paint(
        rng,
        image,
        class_id,
        1.3 * radius,
        lambda u, v: shape(u * (stretch / radius), v / (stretch * radius)) * (radius * shrink),
    )
    label[window][inside] = class_id


_Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _paint(
    rng: np.random.Generator, image: np.ndarray, class_id: int, reach: np.floating, distance: _Distance
) -> tuple[tuple[slice, slice], np.ndarray]:
    """Paints a shape at a random place and angle, with colour, texture and shading for its class.

    Args:
        image: [H, W, 3] float32, painted in place.
        reach: upper bound of the distance of the shape from its centre, in pixels.
        distance: signed distance in pixels, at coordinates about the centre; the edge is soft about zero.

    Returns:
        The painted window, and a mask of the pixels in it with negative distance.
    """
    centre = [_uniform(rng, 0.05, 0.95) * length for length in image.shape[:2]]
    edges = [
        (max(0, int(middle - reach - 2)), min(length, int(middle + reach + 3)))
        for middle, length in zip(centre, image.shape[:2], strict=True)
    ]
    y, x = _grid(*(np.arange(*edge) - middle for edge, middle in zip(edges, centre, strict=True)))
    angle = rng.uniform(0, 2 * np.pi)
    sine, cosine = np.float32(np.sin(angle)), np.float32(np.cos(angle))
    u, v = cosine * x + sine * y, cosine * y - sine * x

    away = distance(u, v)
    alpha = np.clip(np.float32(0.5) - away / _uniform(rng, 1.0, 2.5), 0, 1)[..., None]
    texture = _texture(rng, class_id, u, v) * _uniform(rng, 0.2, 0.45)
    shade = np.clip(1 + u * _uniform(rng, -0.012, 0.012), np.float32(0.7), np.float32(1.3))
    # Five hues a fifth of a turn apart, each spread over a seventh of a turn.
    color = _color(rng, class_id / 5, 0.07)
    window = (slice(*edges[0]), slice(*edges[1]))
    image[window] += alpha * (color * (shade * (1 + texture))[..., None] - image[window])
    return window, away < 0


def _box_distance(u: np.ndarray, v: np.ndarray, half_u: float, half_v: float) -> np.ndarray:
    return np.maximum(np.abs(u) - np.float32(half_u), np.abs(v) - np.float32(half_v))


# Signed distances of shapes of about radius 1; slightly too small outside of corners.
_DISTANCES: tuple[_Distance, ...] = (
    lambda u, v: np.hypot(u, v) - np.float32(0.9),
    lambda u, v: _box_distance(u, v, 0.8, 0.8),
    lambda u, v: np.maximum(v, np.float32(0.866) * np.abs(u) - np.float32(0.5) * v) - np.float32(0.55),
    lambda u, v: np.abs(np.hypot(u, v) - np.float32(0.75)) - np.float32(0.25),
    lambda u, v: np.minimum(_box_distance(u, v, 1.0, 0.32), _box_distance(u, v, 0.32, 1.0)),
)


def _texture(rng: np.random.Generator, class_id: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """[H, W] float32 in [-1, 1]: mostly the texture of the class, else that of a random class."""
    kind = class_id - 1 if rng.random() < 0.85 else int(rng.integers(5))
    if kind == 4:
        return 2 * rng.random(size=u.shape, dtype=np.float32) - 1
    wave = np.float32(2 * np.pi) / _uniform(rng, 4, 9)
    phase_u, phase_v = _uniform(rng, 0, 2 * np.pi), _uniform(rng, 0, 2 * np.pi)
    if kind == 3:
        return np.sin(np.hypot(u, v) * wave + phase_u)
    first, second = np.sin(u * wave + phase_u), np.sin(v * wave + phase_v)
    if kind == 0:
        return first
    if kind == 1:
        return np.sign(first * second)
    return np.where(first + second > 0.6, np.float32(1), np.float32(-0.4))


def _color(rng: np.random.Generator, hue: float, spread: float) -> np.ndarray:
    """[3] float32: a hue within `spread` turns of `hue`, with moderate saturation and value."""
    turns = hue + rng.uniform(-spread, spread) + np.array([0.0, 2 / 3, 1 / 3])
    pure = np.clip(np.abs((turns % 1.0) * 6 - 3) - 1, 0, 1)
    saturation, value = rng.uniform(0.25, 0.9), rng.uniform(0.35, 0.95)
    return (value * (1 - saturation * (1 - pure))).astype(np.float32)


def _photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """uint8: uneven light, exposure, a slightly soft lens and noise."""
    height, width = image.shape[:2]
    row, column = _grid(np.linspace(-1, 1, height), np.linspace(-1, 1, width))
    light = 1 + _uniform(rng, -0.25, 0.25) * row + _uniform(rng, -0.25, 0.25) * column
    image = image * (light * _uniform(rng, 0.75, 1.15))[..., None]
    spread = _uniform(rng, 0.0, 0.2)
    padded = np.pad(image, [(1, 1), (0, 0), (0, 0)], mode="edge")
    image = image + spread * (padded[:-2] + padded[2:] - 2 * image)
    padded = np.pad(image, [(0, 0), (1, 1), (0, 0)], mode="edge")
    image = image + spread * (padded[:, :-2] + padded[:, 2:] - 2 * image)
    image = image + _uniform(rng, 0.01, 0.03) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _grid(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    row, column = np.meshgrid(rows.astype(np.float32), columns.astype(np.float32), indexing="ij")
    return row, column


def _uniform(rng: np.random.Generator, low: float, high: float) -> np.float32:
    # A float32 scalar, so that arrays stay float32.
    return np.float32(rng.uniform(low, high))
