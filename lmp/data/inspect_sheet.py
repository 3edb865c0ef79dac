"""The pictures of `lmp data inspect`: a contact sheet of a film's shots, or how alike their features are."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmp.data.head import clock
from lmp.data.inspect_film import Inspected, Seen, decibels, facts
from lmp.errors import UserError

COLUMNS, ROWS = 6, 8
"""Shots on a page."""
_CELL, _PICTURE = (240, 240), (228, 128)
_MARGIN, _LINE = 24, 19
_WIDTH = 2 * _MARGIN + COLUMNS * _CELL[0]
_QUIET_DB = -60.0  # the loudness bar begins here and ends at full scale
_MOST = 1200  # rows and columns of a matrix; of more shots some are left out
_LEGEND = "NAME 0.93: cosine with the shot before. Struck through: the shot lacks it. Bar: loudness (RMS), -60 to 0 dB."
_INK, _GREY, _PALE, _RED, _GREEN = "#1b1f24", "#6b7280", "#e5e7eb", "#c62828", "#2e7d32"


def shot_pages(found: Inspected, seen: Seen, pictures: Iterable[np.ndarray], out: Path) -> list[Path]:
    """Draw every shot: its picture, number, time, length, modalities, loudness, words and marks.

    Args:
        found, seen: of the same shots.
        pictures: uint8 [height, width, 3] of each shot, taken one by one.
        out: the PNG; where there are more shots than fit, STEM-1.png, STEM-2.png, ...

    Returns:
        The files, in order; written when all are drawn.

    Raises:
        UserError: matplotlib (which brings Pillow) is not installed, or a file cannot be written.
    """
    shots, on_page = len(found.shots_S2), COLUMNS * ROWS
    count = -(-shots // on_page)
    drawn: list[bytes] = []
    page: _Page | None = None
    for shot, picture in enumerate(pictures):
        if page is None:
            lines = [*facts(found), *seen.notes, _LEGEND]
            if count > 1:
                lines[0] += f", page {len(drawn) + 1} of {count}"
            page = _Page(lines, min(ROWS, -(-(shots - shot) // COLUMNS)) * _CELL[1])
        page.shot(shot % on_page, found, seen, shot, picture)
        if (shot + 1) % on_page == 0 or shot + 1 == shots:
            drawn.append(page.png())
            page = None
    paths = [out if count == 1 else out.with_name(f"{out.stem}-{n}{out.suffix}") for n in range(1, count + 1)]
    for path, png in zip(paths, drawn, strict=True):
        _write(path, png)
    return paths


def features_page(found: Inspected, out: Path) -> None:
    """Draw how alike the features of any two shots are, and along the film their norm, likeness and presence.

    Scenes show as squares on the diagonal, repeated features as bright ones, missing shots as grey lines.

    Raises:
        UserError: Pillow and matplotlib are not installed, or the file cannot be written.
    """
    names = list(found.features)
    side = (_WIDTH - _MARGIN * (len(names) + 1)) // max(len(names), 2)
    strip = 26
    page = _Page(facts(found), side + 60 + len(names) * (3 * strip + 50) + 30)
    top = page.top
    for number, name in enumerate(names):
        left = _MARGIN + number * (side + _MARGIN)
        page.text((left, top), f"{name}: cosine of centred features, -1 to 1, shot by shot")
        page.picture((left, top + 24), _colours((_alike(found, name) + 1) / 2), (side, side))
        page.ticks(found, left, top + 26 + side, side)
    at, wide = top + side + 60, _WIDTH - 2 * _MARGIN - 150
    for name in names:
        page.text((_MARGIN, at), name, bold=True)
        norms = np.linalg.norm(found.features[name], axis=1)
        highest = float(norms.max()) or 1.0
        lines = {
            f"norm, to {highest:.3g}": np.where(found.valid[name], norms / highest, np.nan),
            "like the one before": found.like[name],
            "there": np.where(found.valid[name], 1.0, np.nan),
        }
        for label, values in lines.items():
            at += strip
            page.text((_MARGIN, at - 4), label, colour=_GREY, small=True)
            page.picture((_MARGIN + 150, at - 6), _colours(values[None]), (wide, strip - 4))
        at += 44
    page.ticks(found, _MARGIN + 150, at - 16, wide)
    _write(out, page.png())


class _Page:
    """A white sheet under some lines of facts.

    Attributes:
        top: where what is below them begins.
    """

    def __init__(self, lines: Sequence[str], height: int) -> None:
        from PIL import Image, ImageDraw

        self._fonts = _fonts()
        wrapped = [part for line in lines for part in self._wrapped(line, _WIDTH - 2 * _MARGIN, "plain")]
        self.top = 2 * _MARGIN + len(wrapped) * _LINE
        self._image = Image.new("RGB", (_WIDTH, self.top + height + _MARGIN), "white")
        self._draw = ImageDraw.Draw(self._image)
        for number, line in enumerate(wrapped):
            self.text((_MARGIN, _MARGIN + number * _LINE), line, bold=number == 0)

    def text(
        self, at: tuple[float, float], text: str, *, colour: str = _INK, bold: bool = False, small: bool = False
    ) -> float:
        """Write a line; its width."""
        font = self._fonts["bold" if bold else "small" if small else "plain"]
        self._draw.text(at, text, fill=colour, font=font)
        return float(font.getlength(text))

    def picture(self, at: tuple[int, int], pixels_HWC: np.ndarray, size: tuple[int, int]) -> None:
        """Put colours there, scaled without blur where they grow."""
        from PIL import Image

        grows = pixels_HWC.shape[1] <= size[0] and pixels_HWC.shape[0] <= size[1]
        scaled = Image.fromarray(pixels_HWC).resize(size, Image.Resampling.NEAREST if grows else Image.Resampling.BOX)
        self._image.paste(scaled, at)

    def ticks(self, found: Inspected, left: int, top: int, width: int) -> None:
        """Numbers and times of some shots under a strip."""
        shots = len(found.shots_S2)
        count = max(1, min(shots, width // 110))
        for number in range(count):
            shot = number * shots // count
            x = left + shot * width // shots
            self._draw.line((x, top - 4, x, top), fill=_GREY)
            label = f"{found.first + shot} at {clock(int(found.shots_S2[shot, 0]))[:-4]}"
            self.text((x, top), label, colour=_GREY, small=True)

    def shot(self, place: int, found: Inspected, seen: Seen, shot: int, picture: np.ndarray) -> None:
        """Draw one shot in its place of the grid."""
        from PIL import Image, ImageOps

        x = _MARGIN + place % COLUMNS * _CELL[0]
        y = self.top + place // COLUMNS * _CELL[1]
        marks = found.marks[shot]
        box = (x, y, x + _PICTURE[0] - 1, y + _PICTURE[1] - 1)
        self._draw.rectangle(box, fill=_INK)
        fitted = ImageOps.contain(Image.fromarray(picture), _PICTURE)
        self._image.paste(fitted, (x + (_PICTURE[0] - fitted.width) // 2, y + (_PICTURE[1] - fitted.height) // 2))
        if marks:
            self._draw.rectangle(box, outline=_RED, width=3)
        for number, mark in enumerate(marks[:6]):
            self._label((x + 4, y + 4 + number * 20), mark)
        start, end = found.shots_S2[shot].tolist()
        at = y + _PICTURE[1] + 4
        used = self.text((x, at), str(found.first + shot), bold=True)
        self.text((x + used + 8, at), f"{clock(start)[:-2]}  {(end - start) / 1000:.1f} s", colour=_GREY)
        self._modalities(x, at + _LINE, found, shot)
        self._loudness(x, at + 2 * _LINE, seen.loudness_db[shot])
        lines = self._wrapped(seen.words[shot], _PICTURE[0], "small")
        if len(lines) > 3:
            lines = [*lines[:2], lines[2][: max(len(lines[2]) - 2, 0)] + "…"]
        for number, line in enumerate(lines):
            self.text((x, at + 3 * _LINE + number * 15), line, small=True)

    def png(self) -> bytes:
        """The sheet as a file."""
        held = io.BytesIO()
        self._image.save(held, format="png", optimize=True)
        return held.getvalue()

    def _label(self, at: tuple[int, int], text: str) -> None:
        width = self._fonts["small"].getlength(text)
        self._draw.rectangle((at[0], at[1], at[0] + width + 8, at[1] + 17), fill=_RED)
        self.text((at[0] + 4, at[1] + 1), text, colour="white", small=True)

    def _modalities(self, x: int, y: int, found: Inspected, shot: int) -> None:
        """Names of the modalities, struck through where the shot lacks them, with the likeness to the one before."""
        at = float(x)
        for name, valid_S in found.valid.items():
            like = found.like[name][shot]
            label = name if math.isnan(like) else f"{name} {like:.2f}"
            there = bool(valid_S[shot])
            width = self.text((at, y + 2), label, colour=_GREEN if there else _GREY, small=True)
            if not there:
                self._draw.line((at, y + 9, at + width, y + 9), fill=_GREY)
            at += width + 10

    def _loudness(self, x: int, y: int, loudness_db: float | None) -> None:
        whole = _PICTURE[0] - 60
        self._draw.rectangle((x, y + 6, x + whole, y + 11), fill=_PALE)
        if loudness_db is not None and loudness_db > _QUIET_DB:
            part = min(1.0, 1 - loudness_db / _QUIET_DB)
            self._draw.rectangle((x, y + 6, x + round(part * whole), y + 11), fill="#1565c0")
        told = "no sound" if loudness_db is None else f"{decibels(loudness_db)} dB"
        self.text((x + whole + 6, y + 1), told, colour=_GREY, small=True)

    def _wrapped(self, text: str, width: int, font: str) -> list[str]:
        """Lines no wider than that: cut between words, and words longer than a line where it ends."""
        length = self._fonts[font].getlength
        lines: list[str] = []
        for word in text.split():
            if lines and length(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
                continue
            lines.append(word)
            while (room := next((n for n in range(1, len(lines[-1])) if length(lines[-1][: n + 1]) > width), 0)) > 0:
                lines[-1:] = [lines[-1][:room], lines[-1][room:]]
        return lines


def _write(path: Path, png: bytes) -> None:
    try:
        path.write_bytes(png)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", remedy="give a FILE.png in a folder") from error


def _fonts() -> dict[str, Any]:
    try:
        import matplotlib
        from PIL import ImageFont
    except ImportError as error:
        raise UserError("pictures need matplotlib and Pillow", remedy="pip install 'lmp[report]'") from error
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    plain, bold = str(folder / "DejaVuSans.ttf"), str(folder / "DejaVuSans-Bold.ttf")
    sizes = {"plain": (plain, 13), "bold": (bold, 13), "small": (plain, 11)}
    # Not Raqm, which a system may lack or have in another version.
    basic = ImageFont.Layout.BASIC
    return {name: ImageFont.truetype(path, size, layout_engine=basic) for name, (path, size) in sizes.items()}


def _alike(found: Inspected, name: str) -> np.ndarray:
    """[N, N] cosines of features less their mean over the film; what all shots share would hide the rest."""
    features_SF, valid_S = found.features[name].astype(np.float64), found.valid[name]
    if valid_S.any():
        features_SF = features_SF - features_SF[valid_S].mean(axis=0)
    unit_SF = features_SF / np.maximum(np.linalg.norm(features_SF, axis=1, keepdims=True), 1e-12)
    every = -(-len(unit_SF) // _MOST)
    alike = unit_SF[::every] @ unit_SF[::every].T
    alike[~valid_S[::every]] = np.nan
    alike[:, ~valid_S[::every]] = np.nan
    return alike


def _colours(values: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of values from 0 to 1; grey where there is none."""
    from matplotlib import colormaps

    coloured = (colormaps["viridis"](np.nan_to_num(values).clip(0, 1))[..., :3] * 255).astype(np.uint8)
    coloured[np.isnan(values)] = (229, 231, 235)
    return coloured
