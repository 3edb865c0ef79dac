"""TransNet V2: the numbers of the published network and procedure, and its place among the detectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")
pytest.importorskip("scenedetect")

from lmp.errors import UserError  # noqa: E402
from lmp.films.detectors import build_finder  # noqa: E402
from lmp.films.media import read_pictures  # noqa: E402
from lmp.films.transnet import TransNetDetector, TransNetV2  # noqa: E402
from tests.films.recipes import film_frames, seeded_weights  # noqa: E402

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden_transnet.json").read_text())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "transnetv2, mine.pth"
    torch.save(seeded_weights(TransNetV2()), path)
    return path


def test_the_network_gives_the_published_numbers(weights: Path) -> None:
    network = TransNetDetector(weights).network
    frames = torch.from_numpy(film_frames(130, 27, 48)[None, :100])
    with torch.inference_mode():
        single_BT, every_BT = network(frames)
    assert single_BT[0, ::5].tolist() == pytest.approx(GOLDEN["single"], rel=1e-4, abs=1e-4)
    assert every_BT[0, ::5].tolist() == pytest.approx(GOLDEN["every"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("frames", [130, 1])
def test_windows_and_scenes_are_those_of_the_release(weights: Path, frames: int) -> None:
    """Every frame is judged once, whatever the length; golden for 130 frames."""
    detector = TransNetDetector(weights, threshold=GOLDEN["threshold"])
    told: list[float] = []
    honest = detector.probabilities

    def watched(window_Thw3: np.ndarray) -> np.ndarray:
        found = honest(window_Thw3)
        assert found.shape == (100,)
        told.extend(found[25:75].tolist())
        return found

    detector.probabilities = watched  # type: ignore[method-assign]
    reading, cuts = detector.start(), []
    for number, picture in enumerate(film_frames(130, 27, 48)[:frames]):
        before = reading.undecided
        found = reading.feed(picture)
        assert all(cut.frame >= before for cut in found)
        assert number - reading.undecided < 75
        cuts += found
    cuts += reading.finish()
    assert len(told) == -(-frames // 50) * 50
    if frames == 130:
        assert told[:130] == pytest.approx(GOLDEN["predictions"], abs=1e-5)
        assert [cut.frame for cut in cuts] == [first for first, _ in GOLDEN["scenes"] if first > 0]


def test_a_run_at_the_end_begins_no_shot(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One over frame 9 alone, one over frames 20 to 22, one that ends where the film does."""
    detector = TransNetDetector(weights)
    told = np.zeros(100, np.float32)
    told[25 + np.array([9, 20, 21, 22, 28, 29])] = 0.6, 0.7, 0.9, 0.8, 0.9, 0.9
    monkeypatch.setattr(detector, "probabilities", lambda window_Thw3: told)
    reading = detector.start()
    cuts = [cut for picture in film_frames(30, 27, 48) for cut in reading.feed(picture)]
    cuts += reading.finish()
    assert [cut.frame for cut in cuts] == [10, 23]
    assert [cut.score for cut in cuts] == pytest.approx([0.6, 0.9])


def test_it_finds_the_shots_of_a_film_in_one_pass(weights: Path, tmp_path: Path) -> None:
    """In frames of 48 x 27, whatever the film's shape."""
    film, frames = tmp_path / "film.mkv", film_frames(30, 48, 64)
    with av.open(str(film), "w") as container:
        video = container.add_stream("ffv1", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "bgr0"
        for picture in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
    finder = build_finder(f"transnetv2:{weights},threshold=0.02", min_shot_s=0)
    reading, cuts = finder.detector.start(), []
    for picture in frames:
        scaled = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            width=48, height=27, format="rgb24", interpolation="BICUBIC"
        )
        cuts += reading.feed(scaled.to_ndarray())
    cuts += reading.finish()
    shots = list(read_pictures(film, [], shots=finder))
    assert cuts
    assert [shot.start_ms for shot in shots] == [0, *(cut.frame * 40 for cut in cuts)]


def test_weights_must_fit_and_are_told_apart(weights: Path, tmp_path: Path) -> None:
    described = build_finder(f"transnetv2:{weights}").describe()
    assert described == {"name": "transnetv2", "version": described["version"], "threshold": 0.5, "min_shot_s": 0.5}
    tensors = torch.load(weights)
    tensors["fc1.bias"][0] += 1
    torch.save(tensors, tmp_path / "other.pth")
    assert build_finder(f"transnetv2:{tmp_path}/other.pth").describe()["version"] != described["version"]
    del tensors["fc1.bias"]
    torch.save(tensors, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"fc1\.bias is missing"):
        build_finder(f"transnetv2:{tmp_path}/less.pth")
