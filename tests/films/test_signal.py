"""Signal features: what they must tell apart, and what they must not depend on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from lmp.errors import UserError
from lmp.films.encoders import Encoder, build_encoders

SPECS = {"video": "signal", "audio": "signal", "text": "signal"}


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    return {name: parts[0] for name, parts in build_encoders(SPECS).items()}


def _shots(seed: int = 0) -> dict[str, list]:
    rng = np.random.default_rng(seed)
    pictures = [
        np.stack([cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (114, 64)) for _ in range(n)])
        for n in (4, 4, 1)
    ]
    sounds = [(rng.normal(size=n) * level).astype(np.float32) for n, level in ((48000, 0.1), (16000, 0.01), (100, 0.3))]
    return {
        "video": pictures,
        "audio": sounds,
        "text": ["Where were you?", "I told you, at the docks!", "No"],
    }


def _cosine(features: Tensor) -> np.ndarray:
    unit = torch.nn.functional.normalize(features[:, 0], dim=-1)
    return (unit @ unit.T).numpy()


@pytest.mark.parametrize("name", SPECS)
def test_shape_scale_and_independence_of_the_batch(encoders: dict[str, Encoder], name: str) -> None:
    encoder, shots = encoders[name], _shots()[name]
    features, valid = encoder.encode(shots)
    assert features.shape == (3, encoder.tokens, encoder.width)
    assert features.dtype == torch.float32
    assert valid.dtype == torch.bool and valid.all()
    assert torch.isfinite(features).all()
    assert 0.05 < features.square().mean().sqrt() < 3
    assert features.abs().max() < 20
    for i, shot in enumerate(shots):
        assert torch.equal(encoder.encode([shot])[0][0], features[i])


@pytest.mark.parametrize(
    ("name", "empty"),
    [
        ("video", [None, np.zeros((0, 64, 96, 3), np.uint8)]),
        ("audio", [None, np.zeros(0, np.float32)]),
        ("text", [None, "", " \n"]),
    ],
)
def test_an_empty_shot_is_not_valid_and_disturbs_no_other(encoders: dict[str, Encoder], name: str, empty: list) -> None:
    shot = _shots()[name][0]
    features, valid = encoders[name].encode([shot, *empty])
    assert valid.tolist() == [True] + [False] * len(empty)
    assert not features[1:].any() and features[0].any()
    features, valid = encoders[name].encode([])
    assert features.shape == (0, 1, encoders[name].width) and valid.shape == (0,)


def test_pictures_tell_colour_place_and_motion(encoders: dict[str, Encoder]) -> None:
    def still(x: int, colour: tuple[int, int, int], moves: int = 0) -> np.ndarray:
        shot = np.full((4, 64, 96, 3), 40, np.uint8)
        for i in range(4):
            shot[i, 20:50, x + moves * i : x + moves * i + 20] = colour
        return shot

    red, small = still(5, (220, 30, 30)), still(5, (220, 30, 30))[:, ::2, ::2]
    shots = [red, small, still(5, (30, 30, 220)), still(70, (220, 30, 30)), still(5, (220, 30, 30), moves=2)]
    features, _ = encoders["video"].encode(shots)
    away = (features[1:] - features[0]).norm(dim=-1)[:, 0]
    assert away[0] < 0.5 * away[1:].min()
    motion = features[:, 0, -2]
    assert motion[0] == 0 < motion[4]


def test_sound_tells_pitch_and_level_and_ignores_phase(encoders: dict[str, Encoder]) -> None:
    time = np.arange(32000, dtype=np.float32) / 16000

    def tone(hertz: float, level: float, phase: float = 0.0) -> np.ndarray:
        return (level * np.sin(2 * np.pi * hertz * time + phase)).astype(np.float32)

    silence = np.zeros(32000, np.float32)
    shots = [tone(440, 0.1), tone(440, 0.1, 1.0), tone(880, 0.1), tone(440, 0.01), silence]
    features, valid = encoders["audio"].encode(shots)
    assert valid.all(), "digital silence is something heard"
    away = (features[1:] - features[0]).norm(dim=-1)[:, 0]
    assert away[0] < 0.1 * away[1:].min()
    level = features[:, 0, :64].mean(dim=-1)
    assert level[0] > level[3] > level[4]


def test_a_long_shot_has_the_sound_of_its_parts(encoders: dict[str, Encoder]) -> None:
    noise = np.random.default_rng(1).normal(size=16000 * 60).astype(np.float32) * 0.1
    features, _ = encoders["audio"].encode([noise, noise[: 16000 * 20]])
    assert (features[0] - features[1]).abs().max() < 0.1


def test_words_tell_spelling(encoders: dict[str, Encoder]) -> None:
    texts = [
        "The ship sails tonight.",
        "the SHIP  sails\ntonight",
        "Ships sailed last night",
        "Bring me more coffee",
    ]
    features, _ = encoders["text"].encode(texts)
    assert torch.allclose(features.norm(dim=-1), torch.ones(4, 1), atol=1e-6)
    near = _cosine(features)[0]
    assert near[1] > near[2] > near[3]
    assert near[1] > 0.8 and abs(near[3]) < 0.3


def test_features_are_the_same_in_another_process(encoders: dict[str, Encoder]) -> None:
    code = (
        "from lmp.films.encoders import build_encoders as b\n"
        "f, _ = b({'text': 'signal'})['text'][0].encode(['Où est le café?'])\n"
        "print(f.double().flatten().tolist())"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    mine = encoders["text"].encode(["Où est le café?"])[0]
    assert json.loads(out) == mine.double().flatten().tolist()


def test_describe_is_json_and_true(encoders: dict[str, Encoder]) -> None:
    for encoder in encoders.values():
        said = json.loads(json.dumps(encoder.describe()))
        assert (said["name"], said["version"]) == (encoder.name, encoder.version)
        assert (said["tokens"], said["width"]) == (encoder.tokens, encoder.width)
        assert said["sampling"]
        assert (encoder.frames > 0) == (encoder.height > 0) == (encoder.kind == "picture")


def test_kinds_are_told_from_the_modality_or_said() -> None:
    built = build_encoders({"audio": "signal", "music": "signal-sound", "plot": "words:signal", "video": "signal"})
    assert [e.kind for (e,) in built.values()] == ["sound", "sound", "words", "picture"]
    assert list(built) == ["audio", "music", "plot", "video"]


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        ({"video": "signl"}, "did you mean signal"),
        ({"video": "signal-pictures"}, "did you mean signal-picture"),
        ({"music": "signal"}, "signal-sound"),
        ({"music": "some/model"}, "sound:some/model"),
        ({"video": "zzz"}, "OWNER/MODEL"),
        ({"video": ""}, "OWNER/MODEL"),
        ({"text": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_an_unknown_encoder_is_the_users_mistake(specs: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        build_encoders(specs)
    assert says in f"{caught.value.problem} {caught.value.remedy}"
