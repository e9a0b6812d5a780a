"""Draws hands that show the digits 0..9 as in the Sign Language Digits photographs: palm to the camera, thumb on the right."""

from __future__ import annotations

import cv2
import numpy as np

# Unit square, y down, centre (0, 0). Fingers: thumb, index, middle, ring, little.
_BASES = np.array([(0.13, 0.16), (0.125, -0.04), (0.045, -0.065), (-0.035, -0.05), (-0.105, -0.01)])
_ANGLES_DEG = np.array([52.0, 10.0, 1.0, -8.0, -19.0])  # from straight up, clockwise
_LENGTHS = np.array([0.26, 0.29, 0.32, 0.29, 0.22])
_RADII = np.array([0.042, 0.036, 0.037, 0.035, 0.031])
_WRIST, _FOREARM = np.array((0.01, 0.3)), np.array((0.03, 0.75))

# Per digit: the stretched fingers, and the finger that the thumb touches (None: the thumb is stretched or lies across the palm).
_SIGNS: dict[int, tuple[tuple[int, ...], int | None]] = {
    1: ((1,), None),
    2: ((1, 2), None),
    3: ((0, 1, 2), None),
    4: ((1, 2, 3, 4), None),
    5: ((0, 1, 2, 3, 4), None),
    6: ((1, 2, 3), 4),
    7: ((1, 2, 4), 3),
    8: ((1, 3, 4), 2),
    9: ((2, 3, 4), 1),
}

Part = tuple[np.ndarray, np.ndarray, float, float]  # a capsule: from, to, radius at either end
Limb = list[Part]  # capsules that are one rounded surface


def draw_hand(digit: int, rng: np.random.Generator, size: int = 100) -> np.ndarray:
    """A hand that shows `digit`, u8[size, size, 3] RGB, on a light background; pose, skin and light are drawn from `rng`."""
    if digit not in range(10):
        raise ValueError(f"a hand shows a digit from 0 to 9, not {digit}")
    limbs = _closed_round(rng) if digit == 0 else _open_palm(*_SIGNS[digit], rng)
    return _render(_posed(limbs, rng), rng, size)


def _open_palm(stretched: tuple[int, ...], touched: int | None, rng: np.random.Generator) -> list[Limb]:
    """Palm with forearm, then the fingers, far ones first."""
    angles = np.radians(_ANGLES_DEG * np.where(np.arange(5) == 0, 1.0, rng.uniform(0.75, 1.35)) + rng.normal(0, 3, 5))
    lengths = _LENGTHS * rng.uniform(0.9, 1.1) * rng.uniform(0.94, 1.06, 5)
    radii = _RADII * rng.uniform(0.9, 1.12)
    along = np.stack((np.sin(angles), -np.cos(angles)), axis=1)
    limbs: list[Limb] = [[(_FOREARM, _WRIST, 0.12, 0.1), *((_WRIST, _BASES[f] + (0.0, 0.05), 0.11, 0.06) for f in (4, 3, 2, 1))]]
    thumb_tip = np.array((-0.035, 0.07) if 4 in stretched else (0.0, 0.05)) + rng.normal(0, 0.012, 2)  # across the palm
    for f in (4, 3, 2, 1):
        if f in stretched:
            joints = [_BASES[f], _BASES[f] + along[f] * lengths[f] * 0.5]
            joints.append(joints[1] + (along[f] + rng.normal(0, 0.06, 2)) * lengths[f] * 0.5)
        elif f == touched:  # half bent towards the thumb, whose tip it meets
            reach = np.array((0.07, -0.11)) if f == 1 else along[f] * lengths[f] * 0.33
            thumb_tip = np.array((0.2, -0.02)) if f == 1 else 0.5 * (_BASES[f] + reach) + (0.06, 0.07)
            thumb_tip = thumb_tip + rng.normal(0, 0.012, 2)
            joints = [_BASES[f], _BASES[f] + reach, thumb_tip]
        else:  # folded on the palm
            knuckle = _BASES[f] + along[f] * 0.045
            joints = [knuckle, knuckle + np.array((rng.normal(0.01, 0.01), 0.12))]
        limbs.append(_finger(joints, radii[f]))
    root = np.array((0.07, 0.24))
    if 0 in stretched:
        thumb = [root, _BASES[0] + along[0] * lengths[0] * 0.35, _BASES[0] + along[0] * lengths[0]]
    else:
        thumb = [root, 0.45 * root + 0.55 * thumb_tip + (0.06, 0.03), thumb_tip]
    return [*limbs, _finger(thumb, radii[0])]


def _closed_round(rng: np.random.Generator) -> list[Limb]:
    """Zero: seen from the side, fingers and thumb close to a ring."""
    centre, radius = np.array((0.06, -0.1)), rng.uniform(0.12, 0.17)
    flat = rng.uniform(0.75, 1.0)

    def arc(from_deg: float, to_deg: float, joints: int) -> np.ndarray:
        turn = np.radians(np.linspace(from_deg, to_deg, joints))
        return np.asarray(centre + np.stack((np.cos(turn), -np.sin(turn) * flat), axis=1) * radius)

    wrist, fingers, thumb = np.array((-0.02, 0.3)), arc(165, -35, 7), arc(220, 310, 4)
    back: Limb = [(np.array((0.04, 0.75)), wrist, 0.1, 0.09), (wrist, fingers[0] + (0.0, 0.08), 0.1, 0.075), (wrist, thumb[1], 0.08, 0.05)]
    behind = fingers + np.array((-0.4, -1.0)) * rng.uniform(0.02, 0.045)  # the finger behind the first, a little higher
    root = wrist + np.array((0.05, -0.1))
    return [back, _finger(list(behind), 0.055), _finger(list(fingers), 0.055), _finger([root, *thumb], 0.05)]


def _finger(joints: list[np.ndarray], radius: float) -> Limb:
    """Capsules from joint to joint that taper to three quarters of the radius."""
    radii = np.linspace(1.08 * radius, 0.78 * radius, len(joints))
    return [(joints[i], joints[i + 1], radii[i], radii[i + 1]) for i in range(len(joints) - 1)]


def _posed(limbs: list[Limb], rng: np.random.Generator) -> list[Limb]:
    """The whole hand scaled, turned and moved a little; narrower when the palm looks to the side."""
    angle, scale = np.radians(rng.normal(0, 8)), rng.uniform(0.85, 1.15)
    turn = scale * np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))]) @ np.diag((rng.uniform(0.82, 1.05), 1.0))
    shift = np.array((rng.normal(0, 0.03), rng.normal(0.06, 0.03)))
    return [[(turn @ a + shift, turn @ b + shift, scale * ra, scale * rb) for a, b, ra, rb in limb] for limb in limbs]


def _render(limbs: list[Limb], rng: np.random.Generator, size: int) -> np.ndarray:
    """Limbs from far to near, anti-aliased by their distance fields and shaded as round, with a dark rim; a soft shadow behind."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x, y = np.meshgrid(axis, axis)
    image = _background(x, y, rng)
    light = rng.normal(0, 0.25, 2)
    red = rng.uniform(150, 235)
    green = red * rng.uniform(0.68, 0.8)
    skin = np.array((red, green, green * rng.uniform(0.72, 0.9)), np.float32)
    surfaces = [_surface(x, y, limb, size) for limb in limbs]
    shadow = cv2.GaussianBlur(np.max([cover for cover, _ in surfaces], axis=0), (0, 0), 0.03 * size)
    shadow = cv2.warpAffine(shadow, np.array([(1, 0, 0.02 * size), (0, 1, 0.03 * size)]), (size, size))
    image *= 1 - rng.uniform(0.05, 0.4) * shadow[..., None]
    for cover, height in surfaces:
        shade = (0.6 + 0.4 * np.sqrt(height)) * (1 + light[0] * x + light[1] * y)
        image += cover[..., None] * (shade[..., None] * skin - image)
    image += rng.uniform(1, 4) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def _background(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    slope = rng.normal(0, 0.12, 2)
    level = rng.uniform(165, 240) * (1 + slope[0] * x + slope[1] * y - rng.uniform(0, 0.8) * (x * x + y * y))
    return np.asarray(level[..., None] * rng.uniform(0.94, 1.0, 3), dtype=np.float32)


def _surface(x: np.ndarray, y: np.ndarray, limb: Limb, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and height (1 on the ridge, 0 at the rim) of the union of a limb's capsules, each f32[size, size] in 0..1."""
    cover, height = np.zeros_like(x), np.zeros_like(x)
    for (ax, ay), (bx, by), radius_a, radius_b in limb:
        reach = max(radius_a, radius_b) + 1 / size
        left, right = (np.clip((value + 0.5) * size, 0, size).astype(int) for value in (min(ax, bx) - reach, max(ax, bx) + reach))
        top, bottom = (np.clip((value + 0.5) * size, 0, size).astype(int) for value in (min(ay, by) - reach, max(ay, by) + reach))
        box = (slice(top, bottom + 1), slice(left, right + 1))
        px, py = x[box] - np.float32(ax), y[box] - np.float32(ay)
        dx, dy = np.float32(bx - ax), np.float32(by - ay)
        along = np.clip((px * dx + py * dy) / max(dx * dx + dy * dy, np.float32(1e-9)), 0, 1)
        distance = np.hypot(px - along * dx, py - along * dy)
        radius = np.float32(radius_a) + along * np.float32(radius_b - radius_a)
        np.maximum(cover[box], np.clip((radius - distance) * size + 0.5, 0, 1), out=cover[box])
        np.maximum(height[box], np.sqrt(np.clip(1 - (distance / radius) ** 2, 0, 1)), out=height[box])
    return cover, height
