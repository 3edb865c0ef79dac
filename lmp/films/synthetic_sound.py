"""The sound of synthetic films: ambience or music, the thing in the picture, voices."""

from __future__ import annotations

import math

import numpy as np

from lmp.films.synthetic_script import FilmSettings, ShotTruth, line_span
from lmp.films.synthetic_world import MOODS, PEOPLE, PLACES, THINGS


class Mixer:
    """Makes the sound of the shots of one film; keeps its voices and the ambience of its places."""

    def __init__(self, rng: np.random.Generator, settings: FilmSettings) -> None:
        self.rng, self.rate, self.fps = rng, settings.sample_rate, settings.fps
        self.volume, self.noise = rng.uniform(0.6, 1.0), 10 ** rng.uniform(-3, -2.3)
        self.tuning, self.music_tuning = math.exp(rng.normal(0, 0.03)), math.exp(rng.normal(0, 0.05))
        self.ambiences: dict[tuple[str, int], np.ndarray] = {}

    def ambience(self, place: str, camera: int) -> np.ndarray:
        """What is heard at a camera's end of the place: four seconds that loop."""
        if (place, camera) not in self.ambiences:
            centre, octaves, pulse, hum = PLACES[place].ambience
            samples = 4 * self.rate
            frequency = np.maximum(np.fft.rfftfreq(samples, 1 / self.rate), 1.0)
            centre *= math.exp(self.rng.normal(0, 0.1)) * (1.8 if camera else 1.0)
            band = np.exp(-0.5 * (np.log2(frequency / centre) / (0.5 * octaves)) ** 2)
            spectrum = band * np.exp(2j * math.pi * self.rng.random(len(band)))
            noise = np.fft.irfft(spectrum, samples)
            t = np.arange(samples) / self.rate
            beat = 0.6 + 0.4 * np.sin(2 * math.pi * round(4 * pulse) / 4 * t)
            tone = (0.9 if camera else 0.4) * np.sin(2 * math.pi * round(4 * hum) / 4 * t) if hum else 0.0
            self.ambiences[place, camera] = noise / noise.std() * beat + tone
        return self.ambiences[place, camera]

    def shot(self, shot: ShotTruth, samples: int) -> np.ndarray:
        """The sound of a shot, float32 [samples]."""
        t = np.arange(samples) / self.rate
        sound = self.noise * self.rng.standard_normal(samples)
        if shot.sound == "ambience":
            loop = self.ambience(shot.place, shot.camera)
            level = 0.05 * (0.35 if shot.size == "close" else 1.0)
            steps = np.arange(samples) * shot.light**2 + self.rng.integers(len(loop))
            sound += level * np.take(loop, steps.astype(int), mode="wrap")
        elif shot.sound == "music":
            sound += 0.10 * self._music(shot, t)
        if self.rng.random() < 0.85:
            sound += 0.16 * self._hits(shot, t)
        if shot.speaker:
            begin, end = (int(second * self.rate) for second in line_span(shot, self.fps))
            loudness = {"wide": 0.12, "medium": 0.2, "close": 0.3}[shot.size]
            sound[begin:end] += loudness * self._voice(shot, t[: end - begin])
        return np.tanh(self.volume * sound).astype(np.float32)

    def _music(self, shot: ShotTruth, t: np.ndarray) -> np.ndarray:
        root, third, tempo = MOODS[shot.mood].music
        root *= self.music_tuning * shot.light**2 * (1.5 if shot.camera else 1.0)  # a theme for each side
        chord = sum(np.sin(2 * math.pi * root * ratio * t) / ratio for ratio in (1, third, 1.5, 2))
        return chord * (0.55 + 0.45 * np.cos(2 * math.pi * tempo * t))

    def _hits(self, shot: ShotTruth, t: np.ndarray) -> np.ndarray:
        """The sound of the thing, again and again: the faster the action, the more often."""
        pitch, sweep = THINGS[shot.thing].sound
        since = (t + self.rng.uniform(0, 0.3)) % (0.65 - 0.5 * shot.speed)
        turns = pitch * self.tuning * since * np.exp2(0.5 * sweep * since)
        return np.sin(2 * math.pi * turns) * np.exp(-since * 14)

    def _voice(self, shot: ShotTruth, t: np.ndarray) -> np.ndarray:
        pitch, formant = PEOPLE[str(shot.speaker)].voice
        pitch *= self.tuning * (1 + 0.15 * (shot.speed - 0.5))
        phase = 2 * math.pi * pitch * t + 1.5 * np.sin(2 * math.pi * 2.3 * t + self.rng.uniform(0, 6))
        harmonics = sum(np.sin(n * phase) * math.exp(-(((n * pitch - formant) / 500) ** 2)) for n in range(1, 13))
        syllables = np.sin(math.pi * (3.5 + 3 * shot.speed) * t) ** 2
        return (0.5 * np.sin(phase) + harmonics) * syllables
