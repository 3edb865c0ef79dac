"""Speech to text: a tiny Whisper in a local folder that says known lines, and one of random weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

pytest.importorskip("av")
pytest.importorskip("scenedetect")

from lmp.cli import main
from lmp.data.index import FilmIndex
from lmp.errors import UserError
from lmp.films import speech
from lmp.films.encoders import build_encoders
from lmp.films.ingest import ingest
from lmp.films.speech import Piece, build_speech, pieces_of
from lmp.films.speech_loops import compression, looped_lines, without_loops, without_repeats
from lmp.films.subtitles import Line, Subtitles
from lmp.films.synthetic import FilmSettings, make_films
from tests.films.recipes import chirp

SECONDS = 4  # what this Whisper hears at once, instead of 30
MARKS = ("startoftranscript", "en", "fr", "translate", "transcribe", "startoflm", "startofprev", "nospeech")
SAID = "Where were you last night?"


def save_whisper(folder: Path, *, says: str | None = None, silent: float = 0.0, languages: bool = True) -> Path:
    """A Whisper of one layer; with `says` ("<|0.00|>words<|1.00|>") it says just that over any sound.

    Its output layer gives to each position of the decoder the token that comes there, because the embedding of the
    position before holds it; `silent` is how much it takes every sound for silence.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [SAID], trainers.BpeTrainer(vocab_size=290, show_progress=False, initial_alphabet=alphabet)
    )
    end = "<|endoftext|>"
    fast = transformers.WhisperTokenizerFast(tokenizer_object=tokenizer, unk_token=end, bos_token=end, eos_token=end)
    fast.pad_token = end
    marks = [f"<|{name}|>" for name in (*MARKS, "notimestamps")]
    fast.add_tokens([transformers.AddedToken(mark, special=True) for mark in marks])
    fast.add_tokens([transformers.AddedToken(f"<|{step * 0.02:.2f}|>") for step in range(SECONDS * 50 + 1)])
    fast.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=SECONDS).save_pretrained(folder)
    number = {mark: fast.convert_tokens_to_ids(mark) for mark in (end, *marks)}
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=len(fast), d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8,
        max_source_positions=SECONDS * 50, max_target_positions=48, pad_token_id=number[end], bos_token_id=number[end],
        eos_token_id=number[end], decoder_start_token_id=number[marks[0]], suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    if says is not None:
        _teach(model, [*fast(says, add_special_tokens=False)["input_ids"], number[end]], number, silent)
    told = transformers.GenerationConfig(
        decoder_start_token_id=number[marks[0]], eos_token_id=number[end], pad_token_id=number[end], max_length=48
    )
    told.no_timestamps_token_id, told.max_initial_timestamp_index = number["<|notimestamps|>"], SECONDS * 50
    told.is_multilingual, told.prev_sot_token_id = languages, number["<|startofprev|>"]
    if languages:
        told.lang_to_id = {mark: number[mark] for mark in ("<|en|>", "<|fr|>")}
        told.task_to_id = {name: number[f"<|{name}|>"] for name in ("transcribe", "translate")}
    model.generation_config = told
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def _teach(model: torch.nn.Module, tokens: list[int], number: dict[str, int], silent: float) -> None:
    layer = model.model.decoder.layers[0]
    for part in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
        part.weight.zero_()
        part.bias.zero_()
    table = torch.nn.functional.normalize(torch.randn(model.proj_out.weight.shape), dim=1)
    model.proj_out.weight.copy_(table)  # tied to the embedding of the tokens
    places = model.model.decoder.embed_positions.weight
    # After the start a language is told, then the task is given, then come the words.
    places[0] = 50 * table[number["<|fr|>"]] + 50 * silent * table[number["<|nospeech|>"]]
    for place, token in enumerate(tokens, start=2):
        places[place] = 50 * table[token]


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("clear"), says=f"<|0.20|>{SAID}<|1.20|><|2.00|> No.<|2.50|>")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two films, the second without subtitles."""
    folder = tmp_path_factory.mktemp("films")
    make_films(folder, films=2, seed=2, settings=FilmSettings(shots=12), workers=1, progress=False)
    (folder / "film-0001.srt").unlink()
    return folder


def sound(seconds: float, *, silence: tuple[float, float] = (0.0, 0.0)) -> Iterator[np.ndarray]:
    """In parts, as a film is decoded."""
    wave = chirp(seconds)
    wave[round(silence[0] * 16000) : round(silence[1] * 16000)] = 0
    yield from np.array_split(wave, 37)


def test_lines_get_their_words_and_times(clear: Path) -> None:
    whisper = build_speech(f"whisper:{clear}")
    heard = whisper.transcribe(sound(3.0))
    assert heard.lines == (Line(200, 1200, SAID), Line(2000, 2500, "No."))
    assert heard.record() == {
        "from": "whisper", "name": clear.name, "version": whisper.version, "language": "fr", "lines": 2, "dropped": 0,
    }  # fmt: skip
    assert build_speech(f"whisper:{clear},language=en").transcribe(sound(3.0)).record()["language"] == "en"
    assert whisper.transcribe([]).lines == ()


def test_a_film_is_cut_where_it_is_quiet_and_what_comes_again_is_dropped(clear: Path) -> None:
    whisper = build_speech(f"whisper:{clear}")
    pieces = list(pieces_of(sound(10.0, silence=(3.1, 3.6)), SECONDS * 16000))
    assert [piece.start for piece in pieces][1] in range(round(3.1 * 16000), round(3.6 * 16000))
    assert np.array_equal(
        np.concatenate([piece.wave for piece in pieces]), np.concatenate(list(sound(10.0, silence=(3.1, 3.6))))
    )
    twice = whisper.transcribe(sound(6.2, silence=(3.0, 3.4)))
    assert [line.text for line in twice.lines] == [SAID, "No."] * 2 and twice.dropped == 0
    assert 3.0 <= twice.lines[2].start_ms / 1000 - 0.2 <= 3.4
    often = whisper.transcribe(sound(16.0))
    assert [line.text for line in often.lines] == [SAID, "No."] and often.dropped >= 6


def test_nothing_is_said_over_silence(clear: Path) -> None:
    whisper = build_speech(f"whisper:{clear}")
    assert whisper.transcribe([np.full(16000 * 9, 1e-5, np.float32)]).lines == ()
    heard = whisper.transcribe(sound(3.0, silence=(1.5, 3.0)))
    assert (heard.lines, heard.dropped) == ((Line(200, 1200, SAID),), 1)
    late = whisper.transcribe(sound(3.0, silence=(0.0, 0.5)))
    assert (late.lines[0].start_ms, late.lines[0].end_ms) == (500, 1200), "its time stamps reach over the silence"
    over_its_end = whisper.transcribe(sound(1.0))
    assert (over_its_end.lines, over_its_end.dropped) == ((Line(200, 1000, SAID),), 1)


def test_a_model_that_takes_it_for_silence_and_is_unsure_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whisper = build_speech(f"whisper:{save_whisper(tmp_path, says=f'<|0.20|>{SAID}<|1.20|>', silent=2.0)}")
    assert len(whisper.transcribe(sound(3.0)).lines) == 1, "it is sure of its words"
    monkeypatch.setattr(speech, "UNLIKELY", 0.0)
    heard = whisper.transcribe(sound(3.0))
    assert (heard.lines, heard.dropped) == ((), 1)


def test_what_the_piece_cuts_off_is_heard_again(tmp_path: Path) -> None:
    """Two time stamps at the end tell of a line that goes on: Whisper moves to it (section 4.5)."""
    whisper = build_speech(f"whisper:{save_whisper(tmp_path, says=f'<|0.00|>{SAID}<|1.50|><|1.50|>')}")
    heard = whisper.transcribe(sound(3.9))
    assert [line.start_ms for line in heard.lines] == [0, 1500]


def test_the_same_sound_gives_the_same_lines_however_it_comes(tmp_path: Path) -> None:
    whisper = build_speech(f"whisper:{save_whisper(tmp_path)}")
    parts = list(sound(11.0))
    heard = whisper.transcribe(parts)
    assert heard == whisper.transcribe([np.concatenate(parts)])
    assert build_speech(f"whisper:{tmp_path}").version == whisper.version
    assert all(0 <= line.start_ms <= line.end_ms <= 11_000 for line in heard.lines)


def test_a_long_film_is_not_held(clear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whisper = build_speech(f"whisper:{clear}")
    read = 0
    seen: list[tuple[int, int]] = []

    def film() -> Iterator[np.ndarray]:
        nonlocal read
        for _ in range(70):
            read += 16000
            yield chirp(1.0)

    honest = speech.Whisper._hear

    def watched(self: speech.Whisper, pieces: list[Piece], language: str | None) -> list:
        seen.append((read, pieces[-1].start + len(pieces[-1].wave)))
        return honest(self, pieces, language)

    monkeypatch.setattr(speech.Whisper, "_hear", watched)
    whisper.transcribe(film())
    assert len(seen) >= 70 / (8 * SECONDS)
    assert all(read <= heard + (SECONDS + 1) * 16000 for read, heard in seen)


def test_an_english_model_needs_no_language(tmp_path: Path) -> None:
    folder = save_whisper(tmp_path, languages=False)
    heard = build_speech(f"whisper:{folder}").transcribe(sound(2.0))
    assert heard.record()["language"] is None
    with pytest.raises(UserError, match="no language 'en'"):
        build_speech(f"whisper:{folder},language=en")


def test_the_words_of_a_film_without_subtitles_reach_its_features(clear: Path, films: Path, tmp_path: Path) -> None:
    specs = {"text": "signal"}
    spec = f"whisper:{clear}"
    report = ingest([films], tmp_path / "heard", encoders=specs, speech=spec, progress=False)
    assert not report.failures
    ingest([films], tmp_path / "read", encoders=specs, progress=False)
    heard, read = FilmIndex.load(tmp_path / "heard"), FilmIndex.load(tmp_path / "read")
    assert heard.info(0)["subtitles"] == read.info(0)["subtitles"], "subtitles win where there are some"
    told = heard.info(1)["subtitles"]
    assert (told["from"], told["version"]) == ("whisper", build_speech(spec).version)
    assert told["lines"] > 0 and read.info(1)["subtitles"] is None
    film = heard.read(1, 0, int(heard.shots[1]))
    said, nothing = film.valid["text"], read.read(1, 0, int(read.shots[1])).valid["text"]
    assert said.any() and not nothing.any()
    wanted = build_encoders(specs)["text"][0].encode([SAID, "No.", f"{SAID} No."])[0]
    for vector in film.features["text"][said]:
        assert any(torch.allclose(torch.as_tensor(vector).float(), one, atol=1e-3) for one in wanted)


def test_another_recogniser_reads_the_films_anew(
    clear: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The films of an interrupted ingest are kept under the recogniser that heard them."""
    for name in ("a", "b"):
        shutil.copy(films / "film-0001.mp4", tmp_path / f"{name}.mp4")
    honest, called = speech.Whisper.transcribe, []

    def interrupted(self: speech.Whisper, waves: Iterable[np.ndarray]) -> Subtitles:
        called.append(self)
        if len(called) == 2:
            raise KeyboardInterrupt
        return honest(self, waves)

    monkeypatch.setattr(speech.Whisper, "transcribe", interrupted)
    specs = {"text": "signal"}
    with pytest.raises(KeyboardInterrupt):
        ingest([tmp_path], tmp_path / "out", encoders=specs, speech=f"whisper:{clear}", progress=False)
    ingest([tmp_path], tmp_path / "out", encoders=specs, speech=f"whisper:{clear},language=en", progress=False)
    index = FilmIndex.load(tmp_path / "out")
    assert [index.info(film)["subtitles"]["language"] for film in range(2)] == ["en", "en"]


def test_random_weights_through_the_command(films: Path, tmp_path: Path) -> None:
    folder = save_whisper(tmp_path / "whisper")
    film = str(films / "film-0001.mp4")
    words = ["ingest", film, "--encoder", "text=signal", "--speech", f"whisper:{folder}"]
    for out in ("a", "b"):
        assert main([*words, "--out", str(tmp_path / out)]) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert [(tmp_path / "a" / name).read_bytes() for name in names] == [
        (tmp_path / "b" / name).read_bytes() for name in names
    ]
    assert FilmIndex.load(tmp_path / "a").info(0)["subtitles"]["from"] == "whisper"


def test_the_users_mistakes(clear: Path, tmp_path: Path) -> None:
    bare = save_whisper(tmp_path / "bare")
    (bare / "generation_config.json").unlink()
    transformers.BertModel(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
        )
    ).save_pretrained(tmp_path / "bert")
    for spec, says in [
        ("wisper:x", "not a recogniser"),
        (f"whisper:{tmp_path}/none", "no folder"),
        (f"whisper:{tmp_path}/bert", "is a bert model"),
        (f"whisper:{bare}", "no time stamps"),
        (f"whisper:{clear},language=xx", "no language 'xx'"),
    ]:
        with pytest.raises(UserError, match=says) as caught:
            build_speech(spec)
        assert caught.value.remedy
    with pytest.raises(UserError, match="no encoder takes words"):
        ingest([clear / "config.json"], tmp_path / "out", encoders={"audio": "signal"}, speech=f"whisper:{clear}")
    assert not (tmp_path / "out").exists()


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 5), st.integers(2, 4))
def test_repeats_are_cut_once_and_for_all(items: list[int], longest: int, times: int) -> None:
    places = without_repeats(items, longest=longest, times=times)
    kept = [items[place] for place in places]
    assert places == sorted(set(places)) and set(kept) == set(items)
    assert without_repeats(kept, longest=longest, times=times) == list(range(len(kept)))
    for at in range(len(kept)):
        for stretch in range(1, longest + 1):
            run = kept[at : at + stretch]
            assert len(run) < stretch or kept[at : at + stretch * times] != run * times
    if longest == 1 and all(a != b for a, b in pairwise(items)):
        assert kept == items


@given(st.lists(st.integers(0, 99), unique=True, max_size=20), st.integers(1, 16), st.integers(4, 9), st.integers(0, 5))
def test_a_planted_loop_leaves_one_stretch(before: list[int], stretch: int, often: int, cut: int) -> None:
    phrase = [100 + i for i in range(stretch)]
    items = before + phrase * often + phrase[: min(cut, stretch - 1)]
    kept = without_repeats(items, longest=16, times=4)
    assert [items[place] for place in kept] == before + phrase


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("I know, I know.", "I know, I know."),
        ("No. No! No, no, no.", "No."),
        ("Thank you so much. Thank you so much. Thank you so much. Thank you so much. Thank", "Thank you so much."),
        ("and the the the the the rest", "and the rest"),
        ("ご視聴ありがとうご視聴ありがとうご視聴ありがとうご視聴ありがとう", "ご視聴ありがとう"),
        ("", ""),
    ],
)
def test_loops_in_a_line(text: str, wanted: str) -> None:
    assert without_loops(text) == wanted


def test_loops_of_lines_and_what_is_dense() -> None:
    talk = ["Where?", "Here.", "Where?", "There.", "No.", "No."]
    assert looped_lines(talk) == set()
    assert looped_lines(["So.", *["Thanks for watching!", "thanks for watching"] * 2, "End."]) == {2, 3, 4}
    assert looped_lines(["A b.", "C d."] * 3) == {2, 3, 4, 5}
    assert compression("No, you were not at the docks last night, and you know it.") < 2.4 < compression("la " * 100)
