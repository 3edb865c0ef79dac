"""The world that synthetic films are set in: places, people, things, moods, genres."""

from __future__ import annotations

from typing import NamedTuple

RGB = tuple[int, int, int]
Texture = tuple[float, float, int, float]
Ambience = tuple[float, float, float, float]


class Place(NamedTuple):
    """Colours of wall and floor; texture as stripe angle (rad), stripe period (px), blob size (px), share of
    stripes; ambience as band centre (Hz), band width (octaves), pulse (Hz), hum (Hz); words."""

    colours: tuple[RGB, RGB]
    texture: Texture
    ambience: Ambience
    words: tuple[str, ...]


class Person(NamedTuple):
    """Colours of clothes and hair; voice as pitch (Hz) and formant (Hz); ways to begin a line."""

    clothes: RGB
    hair: RGB
    voice: tuple[float, float]
    fillers: tuple[str, ...]


class Thing(NamedTuple):
    """Colour; shape; sound as frequency (Hz) and sweep (octaves per second); words."""

    colour: RGB
    shape: str
    sound: tuple[float, float]
    words: tuple[str, ...]


class Mood(NamedTuple):
    """Tint (shift of U and V); light (factor); music as root (Hz), third (ratio), tempo (Hz); phrases."""

    tint: tuple[float, float]
    light: float
    music: tuple[float, float, float]
    phrases: tuple[str, ...]


class Genre(NamedTuple):
    """Favoured places and moods; mean length of a shot (s); share of scenes with music."""

    places: tuple[str, ...]
    moods: tuple[str, ...]
    shot_s: float
    music: float


def _place(wall: RGB, floor: RGB, texture: Texture, ambience: Ambience, words: str) -> Place:
    return Place((wall, floor), texture, ambience, tuple(words.split()))


PLACES: dict[str, Place] = {
    "kitchen": _place(
        (214, 176, 120),
        (150, 96, 60),
        (0.0, 18, 30, 0.6),
        (900, 1.0, 3.0, 240),
        "kitchen stove soup cupboard",
    ),
    "forest": _place(
        (70, 140, 60), (36, 80, 40), (0.0, 11, 12, 0.5), (2600, 1.2, 1.2, 0), "forest trees moss branches"
    ),
    "street": _place(
        (120, 124, 140),
        (80, 82, 96),
        (1.57, 30, 16, 0.4),
        (300, 2.0, 0.7, 95),
        "street traffic corner pavement",
    ),
    "desert": _place((232, 196, 110), (204, 140, 74), (1.3, 46, 50, 0.5), (700, 1.6, 0.3, 0), "desert sand dunes sun"),
    "harbour": _place(
        (96, 160, 196), (40, 90, 130), (1.57, 12, 26, 0.6), (480, 1.8, 0.5, 0), "harbour boats tide pier"
    ),
    "office": _place(
        (206, 212, 214),
        (140, 156, 170),
        (0.0, 26, 40, 0.8),
        (1400, 0.8, 5.0, 120),
        "office desk meeting printer",
    ),
    "church": _place(
        (150, 110, 150), (90, 62, 104), (0.0, 38, 34, 0.7), (260, 0.8, 0.4, 392), "church altar choir bells"
    ),
    "cave": _place((124, 84, 58), (66, 48, 40), (0.8, 22, 14, 0.2), (180, 1.0, 0.9, 60), "cave rocks echo torches"),
    "station": _place(
        (150, 160, 120),
        (100, 96, 76),
        (0.4, 16, 36, 0.8),
        (420, 1.4, 2.2, 180),
        "station platform train tickets",
    ),
    "bedroom": _place(
        (220, 150, 160),
        (166, 92, 112),
        (0.8, 24, 44, 0.5),
        (1000, 0.6, 1.6, 0),
        "bedroom pillow blanket window",
    ),
    "meadow": _place(
        (140, 200, 90), (90, 150, 60), (1.0, 9, 20, 0.3), (3600, 0.9, 2.6, 0), "meadow grass flowers fence"
    ),
    "laboratory": _place(
        (130, 214, 204),
        (70, 150, 150),
        (1.57, 20, 24, 0.8),
        (1900, 0.5, 4.0, 310),
        "laboratory samples microscope formula",
    ),
}
PEOPLE: dict[str, Person] = {
    "Anna": Person((200, 40, 50), (60, 36, 24), (220, 900), ("well", "honestly")),
    "Boris": Person((40, 60, 150), (30, 30, 34), (96, 500), ("listen", "of course")),
    "Clara": Person((240, 200, 60), (210, 160, 80), (262, 1300), ("oh", "you know")),
    "David": Person((60, 130, 70), (120, 74, 40), (118, 700), ("I think", "perhaps")),
    "Elena": Person((150, 60, 160), (160, 60, 30), (196, 1100), ("please", "my dear")),
    "Frank": Person((230, 230, 226), (150, 150, 150), (84, 900), ("look", "as I said")),
    "Greta": Person((40, 180, 190), (230, 200, 120), (240, 600), ("wait", "guess what")),
    "Hugo": Person((220, 120, 40), (40, 26, 20), (136, 1200), ("hmm", "frankly")),
}
THINGS: dict[str, Thing] = {
    "lantern": Thing((255, 220, 60), "disc", (660, 0.0), ("lantern", "flame")),
    "letter": Thing((245, 245, 240), "bar", (1500, -4.0), ("letter", "paper")),
    "knife": Thing((180, 190, 200), "wedge", (2600, -6.0), ("knife", "blade")),
    "apple": Thing((220, 30, 40), "disc", (350, -3.0), ("apple", "fruit")),
    "radio": Thing((90, 50, 30), "box", (1000, 3.0), ("radio", "song")),
    "key": Thing((220, 170, 30), "wedge", (3200, 2.0), ("key", "lock")),
    "bird": Thing((40, 120, 230), "wedge", (2200, 8.0), ("bird", "wings")),
    "box": Thing((30, 150, 60), "box", (240, -1.0), ("box", "package")),
    "balloon": Thing((240, 80, 180), "disc", (500, 4.0), ("balloon", "string")),
    "phone": Thing((20, 20, 24), "bar", (1250, 0.0), ("phone", "number")),
}
MOODS: dict[str, Mood] = {
    "calm": Mood((0, 0), 1.0, (220, 1.26, 0.8), ("quiet now", "there is time", "stay a while")),
    "tense": Mood((7, -5), 0.84, (147, 1.19, 3.0), ("be careful", "somebody follows us", "do not move")),
    "joyful": Mood((-6, 5), 1.12, (294, 1.26, 2.2), ("how wonderful", "I could dance", "what a day")),
    "sad": Mood((4, -4), 0.92, (175, 1.19, 0.5), ("I miss them", "it is over", "so long ago")),
    "angry": Mood((-3, 9), 0.96, (110, 1.41, 4.0), ("enough of this", "you lied to me", "get out")),
}
GENRES: dict[str, Genre] = {
    "thriller": Genre(("street", "station", "harbour", "office", "cave"), ("tense", "angry"), 1.05, 0.45),
    "romance": Genre(("bedroom", "meadow", "church", "kitchen", "harbour"), ("joyful", "sad"), 1.45, 0.5),
    "western": Genre(("desert", "station", "church", "meadow", "cave"), ("calm", "angry"), 1.35, 0.3),
    "mystery": Genre(("forest", "cave", "laboratory", "church", "street"), ("tense", "calm"), 1.25, 0.4),
    "comedy": Genre(("kitchen", "office", "street", "bedroom", "laboratory"), ("joyful", "calm"), 1.15, 0.3),
}
FILLERS = ("yes", "no", "what now", "go on", "not yet", "I see")
VERBS = (("rests", "waits", "lies there"), ("turns", "moves", "is coming"), ("races", "flies", "spins"))
"""Of the thing, by speed: slow, middling, fast."""
