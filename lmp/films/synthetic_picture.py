"""The picture of synthetic films: planes in Y, U, V (BT.601, limited range), drawn with numpy alone."""

from __future__ import annotations

import math

import numpy as np

from lmp.films.synthetic_script import FilmSettings, ShotTruth
from lmp.films.synthetic_world import MOODS, PEOPLE, PLACES, RGB, THINGS


class Painter:
    """Draws the shots of one film; keeps its colours and its camera set-ups."""

    def __init__(self, rng: np.random.Generator, settings: FilmSettings) -> None:
        self.rng, self.width, self.height, self.fps = rng, settings.width, settings.height, settings.fps
        self.margin = 8
        angle, saturation = rng.normal(0, 0.12), rng.uniform(0.75, 1.1)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        self.chroma = turn * saturation
        self.tint = rng.normal(0, 3, 2)
        self.contrast, self.lift = rng.uniform(0.85, 1.1), rng.uniform(-6, 10)
        tone = rng.uniform(0.6, 1.1)
        self.skin = int(214 * tone), int(160 * tone), int(130 * tone)
        self.grain_GHW = rng.normal(0, rng.uniform(1.5, 5), (12, self.height, self.width)).astype(np.float32)
        self.setups: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        self.dyes: dict[str, np.ndarray] = {}

    def colour(self, rgb: RGB, name: str | None = None) -> np.ndarray:
        """Y, U, V of a colour in this film; a named one is a little off, always the same way."""
        matrix = np.array([[0.257, 0.504, 0.098], [-0.148, -0.291, 0.439], [0.439, -0.368, -0.071]])
        if name and name not in self.dyes:
            self.dyes[name] = self.rng.normal(0, 9, 3)
        y, *uv = matrix @ np.clip(np.array(rgb) + (self.dyes[name] if name else 0.0), 0, 255)
        return np.array([16 + y * self.contrast + self.lift, *(128 + self.chroma @ uv + self.tint)])

    def setup(self, place: str, camera: int) -> tuple[np.ndarray, np.ndarray]:
        """What a camera sees of a place, twice as wide and high as the frame: Y [2H, 2W] and UV [2, H, W]."""
        if (place, camera) not in self.setups:
            angle, period, cell, stripes = PLACES[place].texture
            high, wide = 2 * self.height, 2 * self.width
            y, x = np.mgrid[:high, :wide].astype(np.float32)
            angle += self.rng.normal(0, 0.1) + 0.3 * camera
            period *= self.rng.uniform(0.85, 1.2)
            wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period))
            blobs = _smooth_noise(self.rng, high, wide, cell)
            texture = stripes * wave + (1 - stripes) * 1.5 * blobs
            wall, floor = (self.colour(rgb, f"{place}{n}") for n, rgb in enumerate(PLACES[place].colours))
            if camera:
                wall, floor = floor, 0.7 * floor + 0.3 * wall
            mix = 1 / (1 + np.exp(-(y - high * self.rng.uniform(0.5, 0.7)) / 6 - 0.7 * texture))
            luma = wall[0] + (floor[0] - wall[0]) * mix + 11 * texture
            half = mix[::2, ::2]
            uv = [w + (f - w) * half for w, f in zip(wall[1:], floor[1:], strict=True)]
            self.setups[place, camera] = luma, np.stack(uv)
        return self.setups[place, camera]

    def shot(self, shot: ShotTruth) -> np.ndarray:
        """The frames of a shot as yuv420p, uint8 [N, 3H/2, W]."""
        frames, margin = shot.end_frame - shot.start_frame, self.margin
        luma, chroma = self._plate(shot)
        turn = 2 * math.pi * (0.3 + shot.speed) * np.arange(frames) / self.fps + self.rng.uniform(0, 6.28)
        reach = (margin - 2) * shot.speed
        # Whole steps of two pixels, so that luma and chroma stay together.
        row_N = margin + 2 * np.round(reach * 0.2 * np.sin(1.7 * turn)).astype(int)
        col_N = margin + 2 * np.round(reach * 0.5 * np.sin(turn)).astype(int)
        high, wide = self.height, self.width
        y_NHW = np.lib.stride_tricks.sliding_window_view(luma, (high, wide))[row_N, col_N]
        uv_2NHW = np.lib.stride_tricks.sliding_window_view(chroma, (high // 2, wide // 2), axis=(1, 2))[
            :, row_N // 2, col_N // 2
        ]
        if shot.size != "close" or self.rng.random() < 0.6:
            self._draw_thing(shot, y_NHW, uv_2NHW, turn)
        y_NHW += self.grain_GHW[self.rng.integers(0, len(self.grain_GHW), frames)]
        planes = np.concatenate([y_NHW.reshape(frames, -1), *uv_2NHW.reshape(2, frames, -1)], axis=1)
        return np.clip(planes, 16, 240).astype(np.uint8).reshape(frames, high * 3 // 2, wide)

    def _plate(self, shot: ShotTruth) -> tuple[np.ndarray, np.ndarray]:
        """The still picture of a shot with a margin on each side: Y, and UV at half the size."""
        margin, zoom = self.margin, {"wide": 1.6, "medium": 1.0, "close": 0.5}[shot.size]
        high, wide = self.height + 2 * margin, self.width + 2 * margin
        full_y, full_uv = self.setup(shot.place, shot.camera)
        middle = self.height * (1.1 + 0.1 * shot.camera)
        rows = np.clip(middle + zoom * (np.arange(high) - high / 2), 0, 2 * self.height - 1).astype(int)
        cols = np.clip(self.width + zoom * (np.arange(wide) - wide / 2), 0, 2 * self.width - 1).astype(int)
        luma = full_y[rows][:, cols].astype(np.float32)
        chroma = full_uv[:, rows[::2] // 2][:, :, cols[::2] // 2].astype(np.float32)
        if shot.size == "close":  # out of focus
            luma = 110 + 0.15 * (luma - 110)
            chroma = 128 + 0.1 * (chroma - 128)
        for number, name in reversed(list(enumerate(shot.people))):
            self._draw_person(name, luma, chroma, size=shot.size, right=shot.camera != number)
        mood = MOODS[shot.mood]
        gain = shot.light * mood.light * (0.6 if shot.camera else 1.15)
        luma = np.clip(16 + (luma - 16) * gain, 16, 235)
        tint = 128 + np.array(mood.tint, dtype=np.float32)
        chroma = tint[:, None, None] + (chroma - 128) * np.float32(0.4 + 0.6 * gain)
        return luma, chroma

    def _draw_person(self, name: str, luma: np.ndarray, chroma: np.ndarray, *, size: str, right: bool) -> None:
        person = PEOPLE[name]
        radius = self.height * {"wide": 0.07, "medium": 0.15, "close": 0.44}[size] * self.rng.uniform(0.92, 1.08)
        high, wide = luma.shape
        shift = {"wide": 0.24, "medium": 0.14, "close": 0.05}[size] + self.rng.normal(0, 0.015)
        y, x = np.ogrid[:high, :wide]
        x = x - wide * (0.5 + (shift if right else -shift))
        y = y - high * {"wide": 0.5, "medium": 0.36, "close": 0.42}[size]
        shapes = (
            (
                (x / (2.1 * radius)) ** 2 + ((y - 3.4 * radius) / (2.6 * radius)) ** 2 < 1,
                self.colour(person.clothes, name),
            ),
            (
                (x / (0.95 * radius)) ** 2 + ((y + 0.15 * radius) / (1.15 * radius)) ** 2 < 1,
                self.colour(person.hair),
            ),
            (
                (x / (0.75 * radius)) ** 2 + ((y - 0.15 * radius) / (0.95 * radius)) ** 2 < 1,
                self.colour(self.skin),
            ),
        )
        for mask, colour in shapes:
            luma[mask] = colour[0]
            chroma[:, mask[::2, ::2]] = colour[1:, None]

    def _draw_thing(self, shot: ShotTruth, y_NHW: np.ndarray, uv_2NHW: np.ndarray, turn_N: np.ndarray) -> None:
        """Moves the thing over the frames, faster and further with speed."""
        thing = THINGS[shot.thing]
        radius = self.height * {"wide": 0.10, "medium": 0.13, "close": 0.12}[shot.size]
        y, x = np.mgrid[-1 : 1 : complex(0, int(2 * radius)), -1 : 1 : complex(0, int(2 * radius))]
        inside = {
            "disc": x**2 + y**2 < 1,
            "box": np.maximum(abs(x), abs(y)) < 0.85,
            "bar": (abs(x) < 0.4) & (abs(y) < 1),
            "wedge": abs(x) < (1 + y) / 2,
        }[thing.shape]
        dy_K, dx_K = (index - int(radius) for index in np.nonzero(inside))
        side = 0.76 if shot.camera == 0 else 0.24
        reach = (0.04 + 0.16 * shot.speed) * self.width
        col_N = self.width * side + reach * np.sin(1.5 * turn_N)
        row_N = self.height * 0.55 + 0.7 * reach * np.cos(2.1 * turn_N)
        col_NK = np.clip(col_N.astype(int)[:, None] + dx_K, 0, self.width - 1)
        row_NK = np.clip(row_N.astype(int)[:, None] + dy_K, 0, self.height - 1)
        colour = self.colour(thing.colour)
        frame_N1 = np.arange(len(turn_N))[:, None]
        y_NHW[frame_N1, row_NK, col_NK] = 16 + (colour[0] - 16) * shot.light * (0.7 if shot.camera else 1.1)
        uv_2NHW[:, frame_N1, row_NK // 2, col_NK // 2] = colour[1:, None, None]


def _smooth_noise(rng: np.random.Generator, high: int, wide: int, cell: int) -> np.ndarray:
    """Standard normal values on a grid of `cell` pixels, bilinear in between, float32 [high, wide]."""
    grid = rng.standard_normal((high // cell + 2, wide // cell + 2)).astype(np.float32)
    y, x = np.arange(high, dtype=np.float32) / cell, np.arange(wide, dtype=np.float32) / cell
    rows, cols = y.astype(int), x.astype(int)
    fy, fx = (y - rows)[:, None], (x - cols)[None]
    across = grid[:, cols] * (1 - fx) + grid[:, cols + 1] * fx
    return across[rows] * (1 - fy) + across[rows + 1] * fy
