"""What the camera of a scene sees: a place, its light and noise, and the hands and other things held up in it."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

from device.config import ModelConfig
from export.distill.corpus import Corpus
from export.hands import draw_hand

cv2.setNumThreads(1)  # one process makes scenes on one core, and OpenCV's threads do not survive a fork

IGNORE = -1  # a label that nobody could give


class Chance:
    """The probabilities that shape the pictures of a scene."""

    # the camera
    moving_shapes, light_changes, background_changes = 0.25, 0.15, 0.15
    # one thing shown
    drawn_hand = 0.12
    mirrored, cutout, soft_edge, fills_frame, out_of_frame = 0.5, 0.15, 0.5, 0.12, 0.12


class Showing(NamedTuple):
    """A hand sign (or, with digit None, a thing that is none) held up; it slides in from appear_s to full_s. Times in s."""

    digit: int | None
    thing: Thing
    appear_s: float
    full_s: float
    gone_s: float

    def missing(self, at_s: float) -> float | None:
        """How far it still has to slide in, 1..0; None when it is not there."""
        if not self.appear_s <= at_s < self.gone_s:
            return None
        return 0.0 if at_s >= self.full_s else (self.full_s - at_s) / (self.full_s - self.appear_s)


def no_pictures(ticks: int, rng: np.random.Generator, c: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """What the loop gives without a camera: black frames u8[T, 2, H, W, 3] and their age, f32[T, 1] in s."""
    age = c.tick_ms / 1000 * np.arange(1, ticks + 1) + rng.choice((0.0, 1.0, 1e4))
    return np.zeros((ticks, 2, c.video.height, c.video.width, 3), np.uint8), age.astype(np.float32)[:, None]


def camera_pictures(
    corpus: Corpus, rng: np.random.Generator, ticks: int, c: ModelConfig, showings: list[Showing], freeze_s: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Showing | None]]:
    """Frames u8[T, 2, H, W, 3] RGB, newest last; its age, f32[T, 1] in s; labels i32[T] and the sign that each tick sees whole.

    A label is 0 (no hand), digit + 1 or IGNORE (a hand on its way). The camera stands still throughout `freeze_s`.
    """
    size, tick_s = (c.video.height, c.video.width), c.tick_ms / 1000
    frames = np.zeros((ticks, 2, *size, 3), np.uint8)
    label, whole = np.zeros(ticks, np.int32), [None] * ticks  # type: np.ndarray, list[Showing | None]
    edges_s = tick_s * np.arange(1, ticks + 1)
    camera = Camera(corpus, rng, size, ticks * tick_s)
    delay_s = rng.uniform(0, tick_s / 2)  # from the newest exposure to the edge
    exposed_s = (edges_s - delay_s)[:, None] + tick_s / 2 * np.array((-1.0, 0.0))
    exposed_s[(exposed_s > freeze_s[0]) & (exposed_s < freeze_s[1])] = freeze_s[0] - 1e-3
    age = (edges_s - exposed_s[:, 1]).astype(np.float32)[:, None]
    for tick in np.flatnonzero(age[:, 0] <= 1.0):  # the runtime blacks out older pictures
        for f in range(2):
            at_s = float(exposed_s[tick, f])
            camera.take(frames[tick, f], at_s, [(s.thing, m) for s in showings if (m := s.missing(at_s)) is not None])
        for s in showings:
            if s.digit is None:
                continue
            there = [s.missing(float(at_s)) for at_s in exposed_s[tick]]
            if there == [0.0, 0.0]:
                label[tick], whole[tick] = 1 + s.digit, s
            elif there != [None, None]:
                label[tick] = IGNORE
    return frames, age, label, whole


_GRAIN_SHIFT = 40  # pixels: every frame sees another window of one field of noise, which is cheaper than new noise


@cache
def _grain(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal noise as f32[height, width, 3], what is above zero and what is below."""
    noise = np.random.default_rng(0).standard_normal((height, width, 3), dtype=np.float32)
    return np.maximum(noise, 0), np.minimum(noise, 0)


class Camera:
    """A place seen in frames of `size` (height, width): background, light, sensor noise, and what moves in it."""

    def __init__(self, corpus: Corpus, rng: np.random.Generator, size: tuple[int, int], length_s: float = 4.0) -> None:
        self._rng, self._size = rng, size
        self._backgrounds = [_background(corpus, rng, size)]
        self._cuts_s: list[float] = []
        if rng.random() < Chance.background_changes:
            self._backgrounds += [_background(corpus, rng, size) for _ in range(2)]
            self._cuts_s = sorted(rng.uniform(0, length_s, 2))
        self._light = (rng.uniform(0.1, 0.35), rng.uniform(0.05, 0.8)) if rng.random() < Chance.light_changes else None  # depth, Hz
        self._shapes = [_Shape(rng, size) for _ in range(rng.integers(1, 4))] if rng.random() < Chance.moving_shapes else []
        height, width = (side + _GRAIN_SHIFT for side in size)
        grains, sigma = _grain(height + 2 * _GRAIN_SHIFT, width + 2 * _GRAIN_SHIFT), rng.uniform(0.5, 7)
        y, x = rng.integers(0, 2 * _GRAIN_SHIFT, 2)
        self._plus, self._minus = (cv2.convertScaleAbs(grain[y : y + height, x : x + width], alpha=sigma) for grain in grains)

    def take(self, frame: np.ndarray, at_s: float, things: list[tuple[Thing, float]]) -> None:
        """Expose one frame (u8[H, W, 3] RGB, written in place); each thing in view comes with how far it still has to slide in, 1..0."""
        frame[:] = self._backgrounds[int(np.searchsorted(self._cuts_s, at_s)) % len(self._backgrounds)]
        for shape in self._shapes:
            shape.draw(frame, at_s)
        for thing, missing in things:
            thing.paste(frame, at_s, missing)
        if self._light:
            depth, rate_hz = self._light
            cv2.convertScaleAbs(frame, frame, 1 - depth * (0.5 + 0.5 * np.sin(2 * np.pi * rate_hz * at_s)))
        y, x = self._rng.integers(0, _GRAIN_SHIFT, 2)
        window = (slice(y, y + self._size[0]), slice(x, x + self._size[1]))
        cv2.add(frame, self._plus[window], frame)
        cv2.subtract(frame, self._minus[window], frame)


class _Shape:
    """Something round or square that crosses the picture."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self._size = size
        self._colour = _any_colour(rng)
        self._at, self._speed = rng.uniform(0, 1, 2), rng.normal(0, 0.25, 2)
        self._axes = (int(rng.uniform(4, 35)), int(rng.uniform(4, 35)))
        self._square = rng.random() < 0.5

    def draw(self, frame: np.ndarray, at_s: float) -> None:
        y, x = (np.mod(self._at + self._speed * at_s, 1.3) * self._size - 15).astype(int).tolist()
        w, h = self._axes
        if self._square:
            cv2.rectangle(frame, (x - w, y - h), (x + w, y + h), self._colour, -1)
        else:
            cv2.ellipse(frame, (x, y), self._axes, 0, 0, 360, self._colour, -1, cv2.LINE_AA)


class Thing:
    """A photographed or drawn hand, or something that is none (digit None), cut out once with its pose and light.

    `size` (height, width) is that of the frames that it is pasted into, one by one.
    """

    def __init__(
        self, corpus: Corpus, rng: np.random.Generator, digit: int | None, size: tuple[int, int], like: Thing | None = None
    ) -> None:
        self._look: int = int(rng.integers(2**32)) if like is None else like._look
        self.person = "drawn"
        rng = np.random.default_rng(self._look)  # two things of one look have one pose, one light and one person
        if rng.random() < Chance.drawn_hand and digit is not None:
            picture = draw_hand(digit, np.random.default_rng(self._look))
        elif digit is None:
            picture = _no_hand(corpus, np.random.default_rng(self._look))
        else:
            photos = corpus.hands[digit]
            mine = [photo for photo in photos if like is not None and photo[1] == like.person] or photos
            picture, self.person = mine[int(rng.random() * len(mine))]
        picture = _relight(picture, rng)
        fills = rng.random() < Chance.fills_frame
        # Room for the drift: the thing is cut out of a canvas larger than the frame.
        margin = 8
        canvas = (size[1] + 2 * margin, size[0] + 2 * margin)
        pose = _pose(rng, canvas, size, fills)
        border = cv2.BORDER_REPLICATE if fills else cv2.BORDER_CONSTANT
        colour = cv2.warpPerspective(picture, pose, canvas, flags=cv2.INTER_LINEAR, borderMode=border)
        if fills:
            alpha = np.full(canvas[::-1], 255, np.uint8)
        else:
            alpha = cv2.warpPerspective(_stencil(rng, picture.shape[0]), pose, canvas, flags=cv2.INTER_LINEAR)
        blur = rng.uniform(0, 1.3)
        if blur > 0.4:
            colour = cv2.GaussianBlur(colour, (0, 0), blur)
        x, y, w, h = cv2.boundingRect(alpha)
        alpha3 = cv2.merge([alpha[y : y + h, x : x + w]] * 3)
        self._size, self._at = size, (y - margin, x - margin)
        self._colour = cv2.multiply(np.ascontiguousarray(colour[y : y + h, x : x + w]), alpha3, scale=1 / 255)
        self._keep = cv2.bitwise_not(alpha3)
        self._drift = (rng.uniform(0, 1) ** 2 * margin, rng.uniform(0.1, 0.6), rng.uniform(0, 6.3, 2))  # pixels, Hz, phases
        angle = rng.uniform(0, 2 * np.pi)
        self._entry = np.array((np.sin(angle), np.cos(angle))) * rng.uniform(50, 110)

    def paste(self, frame: np.ndarray, at_s: float, missing: float) -> None:
        """Draw it into a frame (u8[H, W, 3], in place), moved by its drift at `at_s` and by what is missing, 1..0, of sliding in."""
        reach, rate_hz, phases = self._drift
        dy, dx = np.sin(2 * np.pi * rate_hz * at_s + phases) * reach + self._entry * missing
        y, x = self._at[0] + round(dy), self._at[1] + round(dx)
        top, left = max(y, 0), max(x, 0)
        bottom, right = min(y + self._keep.shape[0], self._size[0]), min(x + self._keep.shape[1], self._size[1])
        if top >= bottom or left >= right:
            return
        inside = (slice(top - y, bottom - y), slice(left - x, right - x))
        view = frame[top:bottom, left:right]
        view[:] = cv2.add(cv2.multiply(view, self._keep[inside], scale=1 / 255), self._colour[inside])


def _pose(rng: np.random.Generator, canvas: tuple[int, int], size: tuple[int, int], fills: bool) -> np.ndarray:
    """From the 100-pixel picture to the canvas: mirror, scale, turn, shear, a little perspective, place. f64[3, 3]."""
    scale = rng.uniform(1.0, 1.3) if fills else rng.uniform(0.55, 1.25)
    angle = np.radians(rng.uniform(-20, 20) * (0.5 if fills else 1.0))
    mirror = -1.0 if rng.random() < Chance.mirrored else 1.0
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    shear = np.array([(1.0, rng.uniform(-0.12, 0.12)), (0.0, rng.uniform(0.9, 1.1))])
    linear = scale * turn @ shear @ np.diag((mirror, 1.0))
    half = 50 * scale
    spare = np.maximum(np.array((size[1], size[0])) / 2 - half, 0)
    if fills:
        spare = np.array((25.0, 6.0))
    elif rng.random() < Chance.out_of_frame:
        spare = spare + 0.3 * half
    centre = np.array(canvas) / 2 + rng.uniform(-1, 1, 2) * spare
    pose = np.eye(3)
    pose[:2, :2] = linear
    pose[:2, 2] = centre - linear @ (50, 50)
    tilt = np.eye(3)
    tilt[2, :2] = rng.uniform(-6e-4, 6e-4, 2)
    to_centre, back = np.eye(3), np.eye(3)
    to_centre[:2, 2], back[:2, 2] = -centre, centre
    return np.asarray(back @ tilt @ to_centre @ pose)


def _stencil(rng: np.random.Generator, side: int) -> np.ndarray:
    """What of the picture is pasted: all of it, with hard or soft edges."""
    stencil = np.zeros((side, side), np.uint8)
    if rng.random() < Chance.soft_edge:
        edge = int(rng.integers(4, 12))
        stencil[edge:-edge, edge:-edge] = 255
        return cv2.blur(stencil, (2 * edge - 1, 2 * edge - 1))
    stencil[1:-1, 1:-1] = 255
    return stencil


def _relight(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Contrast, brightness, gamma and colour; sometimes a piece hidden."""
    ramp = np.linspace(0, 1, 256)
    gamma, contrast, brightness = np.exp(rng.normal(0, 0.25)), rng.uniform(0.65, 1.25), rng.normal(0, 0.08)
    tone = (ramp**gamma - 0.5) * contrast + 0.5 + brightness
    table = np.clip(255 * tone[:, None] * rng.uniform(0.85, 1.12, 3), 0, 255).astype(np.uint8)
    lit = cv2.LUT(picture, table[None])
    if rng.random() < Chance.cutout:
        y, x = rng.integers(0, 85, 2)
        h, w = rng.integers(5, 16, 2)
        lit[y : y + h, x : x + w] = _any_colour(rng)
    return lit


def _background(corpus: Corpus, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A wall with a gradient, a wall with things, coarse texture, or a photograph out of focus; u8[H, W, 3]."""
    h, w = size
    kind = rng.random()
    if kind < 0.3:
        photos = corpus.hands[int(rng.integers(10))]
        side = int(rng.integers(3, 8))  # so few pixels that no hand is left to recognise
        few = cv2.resize(photos[rng.integers(len(photos))][0], (side, side), interpolation=cv2.INTER_AREA)
        return _relight(cv2.resize(few, (w, h), interpolation=cv2.INTER_CUBIC), rng)
    grid = (int(rng.integers(2, 12)), int(rng.integers(2, 14)))
    contrast = rng.uniform(2, 30)
    coarse = rng.uniform(40, 235) * rng.uniform(0.85, 1.1, 3) + rng.normal(0, contrast, (*grid, 1))
    coarse += rng.normal(0, 0.25 * contrast, coarse.shape)  # less in colour than in brightness, as in rooms
    smooth = cv2.resize(coarse.astype(np.float32), (w, h), interpolation=cv2.INTER_CUBIC)
    picture: np.ndarray = np.clip(smooth, 0, 255).astype(np.uint8)
    if kind < 0.75:
        for _ in range(rng.integers(1, 8)):
            _random_shape(picture, rng)
        if rng.random() < 0.5:
            picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.5, 4))
    return picture


def _no_hand(corpus: Corpus, rng: np.random.Generator) -> np.ndarray:
    """A thing held up that is no hand: paper with shapes, or a hand sign so scrambled that it shows nothing; u8[100, 100, 3]."""
    if rng.random() < 0.3:
        photos = corpus.hands[int(rng.integers(10))]
        tiles = photos[rng.integers(len(photos))][0].reshape(4, 25, 4, 25, 3).swapaxes(1, 2).reshape(16, 25, 25, 3)
        return np.ascontiguousarray(rng.permutation(tiles).reshape(4, 4, 25, 25, 3).swapaxes(1, 2).reshape(100, 100, 3))
    picture = np.full((100, 100, 3), _any_colour(rng), np.uint8)
    for _ in range(rng.integers(0, 7)):
        _random_shape(picture, rng)
    return picture


def _random_shape(picture: np.ndarray, rng: np.random.Generator) -> None:
    h, w = picture.shape[:2]
    (xa, xb, xc), (ya, yb, yc) = rng.integers(0, w, 3).tolist(), rng.integers(0, h, 3).tolist()
    colour, kind = _any_colour(rng), rng.random()
    if kind < 0.3:
        cv2.rectangle(picture, (xa, ya), (xb, yb), colour, -1)
    elif kind < 0.6:
        cv2.ellipse(picture, (xa, ya), (2 + xb // 4, 2 + yb // 4), xc, 0, 360, colour, -1, cv2.LINE_AA)
    elif kind < 0.8:
        cv2.line(picture, (xa, ya), (xb, yb), colour, int(rng.integers(1, 12)), cv2.LINE_AA)
    else:
        cv2.fillPoly(picture, [np.array([(xa, ya), (xb, yb), (xc, yc)], np.int32)], colour, cv2.LINE_AA)


def _any_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """Any colour, one time in three that of skin: colour alone must not make a hand."""
    if rng.random() < 0.33:
        red = rng.uniform(110, 240)
        return int(red), int(red * rng.uniform(0.65, 0.82)), int(red * rng.uniform(0.48, 0.72))
    r, g, b = rng.integers(10, 246, 3).tolist()
    return r, g, b
