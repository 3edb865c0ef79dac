"""Networks on a GPU: the numbers of the CPU up to rounding, and the same ones each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("scenedetect")

from lmp.errors import UserError
from lmp.films.encoders import build_encoders
from lmp.films.encoders.r2plus1d import R2Plus1D
from lmp.films.encoders.vggish import VGGish
from lmp.films.ingest import ingest
from lmp.films.speech import build_speech
from lmp.films.synthetic import FilmSettings, make_films
from tests.films.recipes import chirp, film_frames, seeded_weights
from tests.films.test_perception import perception_sound, saved, videoprism
from tests.films.test_sentences import SAID
from tests.films.test_speech import save_whisper, sound
from tests.films.test_tokens import FAMILIES, save

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHOTS: dict[str, list[Any]] = {
    "audio": [chirp(0.9), chirp(0.4), None],
    "video": [film_frames(4, 40, 56), film_frames(9, 32, 32), None],
    "text": [*SAID, ""],
}


def spec_of(folder: Path, family: str) -> tuple[str, str]:
    """The modality and the spec of an encoder with random weights."""
    if family == "r2plus1d":
        torch.save(seeded_weights(R2Plus1D(18)), folder / "r18.pth")
        return "video", f"r2plus1d:{folder}/r18.pth,frames=4"
    if family == "vggish":
        torch.save(seeded_weights(VGGish()), folder / "vggish.pt")
        return "audio", f"vggish:{folder}/vggish.pt"
    if family == "videoprism":
        videoprism(folder, text=True)
        return "video", f"videoprism:{folder}"
    if family == "pe_audio":
        import transformers

        saved(folder, perception_sound())
        transformers.PeAudioFeatureExtractor(hop_length=128, sampling_rate=16000).save_pretrained(folder)
        return "audio", f"pe_audio:{folder}"
    save(folder, family)
    return FAMILIES[family][0], f"{family}:{folder}"


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("family", ["r2plus1d", "vggish", "videoprism", "pe_audio", *FAMILIES])
def test_features_are_those_of_the_cpu_and_the_same_each_time(tmp_path: Path, family: str) -> None:
    modality, spec = spec_of(tmp_path, family)
    (on_cpu,) = build_encoders({modality: spec})[modality]
    (on_cuda,) = build_encoders({modality: spec}, device="cuda")[modality]
    assert on_cuda.describe() == on_cpu.describe()
    wanted, valid = on_cpu.encode(SHOTS[modality])
    made, also_valid = on_cuda.encode(SHOTS[modality])
    assert made.device.type == "cpu" and torch.equal(valid, also_valid)
    torch.testing.assert_close(made, wanted, atol=1e-3, rtol=1e-3)
    assert torch.equal(made, on_cuda.encode(SHOTS[modality])[0])


@pytest.mark.gpu
@on_gpu
def test_a_film_is_ingested_on_a_gpu_twice_the_same(tmp_path: Path) -> None:
    make_films(tmp_path / "films", films=2, seed=3, settings=FilmSettings(shots=12), workers=1, progress=False)
    (tmp_path / "films" / "film-0000.srt").unlink()
    whisper = save_whisper(tmp_path / "whisper", says=f"<|0.20|>{SAID[0]}<|1.20|>")
    modality, spec = spec_of(tmp_path, "videomae")
    for out, workers in (("a", 1), ("b", 2)):
        report = ingest(
            [tmp_path / "films"], tmp_path / out, encoders={modality: spec, "text": "signal"},
            speech=f"whisper:{whisper}", workers=workers, device="cuda", progress=False,
        )  # fmt: skip
        assert (report.films, report.failures) == (2, [])
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    spoken = [build_speech(f"whisper:{whisper}", device=device).transcribe(sound(3.0)) for device in ("cpu", "cuda")]
    assert spoken[0] == spoken[1]


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_told_before_films_are_read(tmp_path: Path, device: str) -> None:
    (tmp_path / "film.mp4").touch()
    for workers in (1, 2):
        with pytest.raises(UserError, match=f"--device {device}") as caught:
            ingest(
                [tmp_path / "film.mp4"], tmp_path / "out", encoders={"text": "signal"}, workers=workers, device=device
            )
        assert "\n" not in caught.value.problem
