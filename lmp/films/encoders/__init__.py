"""Encoders: from the picture, sound and words of shots to features."""

from lmp.films.encoders.base import Encoder, Kind
from lmp.films.encoders.build import build_encoders, describe

__all__ = ["Encoder", "Kind", "build_encoders", "describe"]
