"""Speech to text, for films without subtitles.

Whisper: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", ICML 2023. Its rules for
long sound (section 4.5), with pieces that are cut where it is quiet, so that they do not wait for each other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmp.errors import UserError
from lmp.films.encoders import saved
from lmp.films.encoders.base import SAMPLE_RATE
from lmp.films.encoders.device import exact
from lmp.films.speech_loops import COMPRESSION, compression, looped_lines, plain, without_loops
from lmp.films.subtitles import Line, Subtitles

QUIET = 1e-3
"""Sound whose loudest tenth of a second is below this (root mean square, -60 dB) holds no speech."""
NO_SPEECH, UNLIKELY = 0.6, -1.0  # a piece above the one and below the other is no speech (section 4.5)
STEP_S = 0.02  # of time stamps
_BLOCK = SAMPLE_RATE // 10
_SHORTEST_S = 1.0  # of a piece that is heard again because its end was cut off
_SPEC = re.compile(r"whisper:(.+?)(?:,language=([^,]*))?")


@dataclass(frozen=True)
class Piece:
    """Sound and where it begins in the film, in samples."""

    start: int
    wave: np.ndarray


@dataclass(frozen=True)
class _Heard:
    """Lines of a piece, how many were no speech, and where to hear on, in seconds, if its end was cut off."""

    lines: list[Line]
    dropped: int
    resume_s: float | None


def build_speech(spec: str, *, device: str = "cpu") -> Whisper:
    """The recogniser that "whisper:FOLDER" or "whisper:OWNER/MODEL" names, and ",language=CODE" after it.

    Raises:
        UserError: another spec, or as `Whisper`.
    """
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise UserError(
            f"--speech {spec}: is not a recogniser of speech",
            remedy="write whisper:FOLDER, or whisper:FOLDER,language=en",
        )
    return Whisper(found[1], language=found[2], device=device)


class Whisper:
    """Lines of subtitles from sound.

    Greedy, in float32: the same sound gives the same lines. Dropped are: lines over sound below -60 dB; pieces that
    the model takes for silence and is unsure of; what is said over and over, in a line or as lines; text that deflate
    makes 2.4 times shorter.

    Args:
        source: a local folder saved with `save_pretrained` (model, generation config and processor), or a name on
            the hub.
        language: its code, such as "en"; None hears it in the first pieces of each film. Not for an English-only model.
        batch_size: pieces of 30 s at once.

    Raises:
        UserError: no such folder or name, files missing from it, another kind of model, or an unknown language.
    """

    def __init__(
        self, source: str, *, language: str | None = None, batch_size: int = 8, device: str | torch.device = "cpu"
    ) -> None:
        import transformers

        role = "speech recogniser"
        self._source, self.name = saved.find(source, role=role)
        config = saved.load(transformers.AutoConfig, self._source, role=role)
        if config.model_type != "whisper":
            raise UserError(f"{source} is a {config.model_type} model, not whisper", remedy="give a Whisper model")
        model = saved.load_model(transformers.WhisperForConditionalGeneration, self._source, role=role)
        self._model = model.to(device, torch.float32).eval().requires_grad_(False)
        self._tokenizer = saved.load(transformers.AutoTokenizer, self._source, role=role)
        self._extractor = saved.load(transformers.AutoFeatureExtractor, self._source, role=role)
        self._longest = int(self._extractor.n_samples)
        self._begin = self._first_time_stamp()
        self._languages = dict(getattr(model.generation_config, "lang_to_id", None) or {})
        self._language = self._checked(language)
        self._batch_size = batch_size
        names = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json")
        self.version = saved.version(model, self._source, *names)

    def describe(self) -> dict[str, Any]:
        """Name, version and language, as JSON."""
        return {"name": self.name, "version": self.version, "language": self._language}

    @exact()
    @torch.inference_mode()
    def transcribe(self, waves: Iterable[np.ndarray]) -> Subtitles:
        """What is said in a film.

        Args:
            waves: its sound from 0 on, mono at 16 kHz, float32, in parts of any length. Held are a few pieces of 30 s.

        Returns:
            Lines in order of time, none perhaps, and how many were dropped.
        """
        heard: list[_Heard] = []
        pieces = (piece for piece in pieces_of(waves, self._longest) if loudest(piece.wave) >= QUIET)
        language = self._language
        while batch := list(islice(pieces, self._batch_size)):
            if language is None and self._languages:
                language = self._language_of(batch)
            while batch:
                made = self._hear(batch, language)
                heard += made
                batch = [rest for piece, one in zip(batch, made, strict=True) if (rest := _rest(piece, one))]
        lines = sorted((line for one in heard for line in one.lines), key=lambda line: (line.start_ms, line.end_ms))
        looped = looped_lines([line.text for line in lines])
        kept = tuple(line for place, line in enumerate(lines) if place not in looped)
        dropped = sum(one.dropped for one in heard) + len(looped)
        return Subtitles(kept, dropped, "", {"from": "whisper", **self.describe(), "language": language})

    def _hear(self, pieces: list[Piece], language: str | None) -> list[_Heard]:
        encoded = self._encoded(pieces)
        spoken = {"language": language, "task": "transcribe"} if self._languages else {}
        sequences_BT = self._model.generate(
            encoder_outputs=encoded,
            attention_mask=torch.ones(encoded.last_hidden_state.shape[:2], device=self._model.device),
            return_timestamps=True,
            **spoken,
            do_sample=False,
            num_beams=1,
            condition_on_prev_tokens=False,
            force_unique_generate_call=True,
            return_dict_in_generate=True,
        ).sequences
        made = []
        for row, piece in enumerate(pieces):
            tokens = sequences_BT[row].tolist()
            # One at a time: the scores of a batch over Whisper's vocabulary would take gigabytes.
            silence, likelihood = self._doubts(encoded.last_hidden_state[row : row + 1], sequences_BT[row : row + 1])
            segments, resume_s = self._segments(tokens, len(piece.wave) / SAMPLE_RATE)
            made.append(self._judged(piece, segments, resume_s, silence > NO_SPEECH and likelihood < UNLIKELY))
        return made

    def _encoded(self, pieces: list[Piece]) -> Any:
        inputs = self._extractor([piece.wave for piece in pieces], sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return self._model.get_encoder()(inputs["input_features"].to(self._model.device, torch.float32))

    def _doubts(self, hidden_1TD: Tensor, tokens_1T: Tensor) -> tuple[float, float]:
        """The probability that nobody speaks, and the mean log-probability of the words."""
        from transformers.modeling_outputs import BaseModelOutput

        logits_TV = self._model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden_1TD), decoder_input_ids=tokens_1T
        ).logits[0]
        logs_TV = logits_TV.float().log_softmax(-1)
        # The token of silence comes before that of "no time stamps".
        silence = float(logs_TV[0, self._begin - 2].exp())
        words_T = self._are_words(tokens_1T[0, 1:])
        told_T = logs_TV[:-1].gather(1, tokens_1T[0, 1:, None])[:, 0][words_T]
        return silence, float(told_T.mean()) if len(told_T) else 0.0

    def _segments(self, tokens: list[int], length_s: float) -> tuple[list[tuple[float, float, str]], float | None]:
        """Start, end and text of what a sequence of tokens tells, and where to hear on if it was cut off.

        A sequence that ends in two time stamps, or in words without their end, tells of more than the piece held.
        """
        segments: list[tuple[float, float, str]] = []
        words: list[int] = []
        start_s, ends, opened = 0.0, 0, False
        for token in tokens:
            if token >= self._begin:
                opened = not words and ends > 0
                now_s = (token - self._begin) * STEP_S
                if words:
                    segments.append((start_s, now_s, self._text(words)))
                    words, ends = [], ends + 1
                start_s = now_s
            elif token < self._first_special():
                words.append(token)
                opened = False
        resume_s = start_s if words or opened else None
        if words and not (ends and _worth_hearing(start_s, length_s)):
            segments.append((start_s, length_s, self._text(words)))
            resume_s = None
        return segments, resume_s if resume_s is None or _worth_hearing(resume_s, length_s) else None

    def _judged(
        self, piece: Piece, segments: list[tuple[float, float, str]], resume_s: float | None, silent: bool
    ) -> _Heard:
        lines = []
        for start_s, end_s, text in segments:
            first, last = round(start_s * SAMPLE_RATE), round(end_s * SAMPLE_RATE)
            (heard,) = np.nonzero(_levels(piece.wave[first : max(last, first + _BLOCK)]) >= QUIET)
            said = without_loops(text)
            # Nothing is heard over the silence that fills a piece up, or over that of the film.
            if len(heard) and plain(said):
                # Time stamps reach over the silence before a line and after it.
                end = min(first + (int(heard[-1]) + 1) * _BLOCK, max(last, first), len(piece.wave))
                begin = min(first + int(heard[0]) * _BLOCK, end)
                lines.append(Line(_ms(piece.start + begin), _ms(piece.start + end), said))
        if silent or compression(" ".join(line.text for line in lines)) > COMPRESSION:
            lines = []
        return _Heard(lines, len(segments) - len(lines), resume_s)

    def _language_of(self, pieces: list[Piece]) -> str:
        """The language of most of these pieces."""
        ids = self._model.detect_language(encoder_outputs=self._encoded(pieces)).tolist()
        codes = {number: token.strip("<|>") for token, number in self._languages.items()}
        return codes[Counter(ids).most_common(1)[0][0]]

    def _text(self, words: list[int]) -> str:
        return " ".join(self._tokenizer.decode(words, skip_special_tokens=True).replace("\ufffd", "").split())

    def _are_words(self, tokens_T: Tensor) -> Tensor:
        return tokens_T < self._first_special()

    def _first_special(self) -> int:
        """All tokens from that of the end on are no words."""
        eos = self._model.generation_config.eos_token_id
        return int(eos[0] if isinstance(eos, list) else eos)

    def _first_time_stamp(self) -> int:
        last_before = getattr(self._model.generation_config, "no_timestamps_token_id", None)
        longest = 2 * self._model.config.max_source_positions * self._extractor.hop_length
        if last_before is None or longest != self._longest:
            what = "its generation config knows no time stamps" if last_before is None else "it has another length"
            raise UserError(
                f"{self._source} cannot recognise speech here: {what}",
                remedy="give the generation_config.json and preprocessor_config.json published with the model",
            )
        return int(last_before) + 1

    def _checked(self, language: str | None) -> str | None:
        if language is not None and f"<|{language}|>" not in self._languages:
            known = ", ".join(token.strip("<|>") for token in self._languages) or "none, for it hears one language only"
            raise UserError(f"{self._source} has no language {language!r} to choose", remedy=f"it has {known}")
        return language


def parts_of(end_ms: int) -> np.ndarray:
    """int32 [P, 2] milliseconds: a film up to its end in parts of half a minute, as they are read."""
    cuts = np.append(np.arange(0, end_ms, 30_000), end_ms).astype(np.int32)
    return np.stack([cuts[:-1], cuts[1:]], axis=1)


def pieces_of(waves: Iterable[np.ndarray], longest: int) -> Iterator[Piece]:
    """Sound cut into pieces of at most `longest` samples, in the quietest moment of their second half."""
    parts: list[np.ndarray] = []
    start = held = 0
    for wave in waves:
        parts.append(np.nan_to_num(np.asarray(wave, dtype=np.float32)))
        held += len(wave)
        while held > longest:
            whole = np.concatenate(parts)
            end = _quietest(whole[:longest])
            yield Piece(start, whole[:end].copy())
            parts, start, held = [whole[end:]], start + end, held - end
    if held:
        yield Piece(start, np.concatenate(parts))


def loudest(wave: np.ndarray) -> float:
    """Root mean square of the loudest tenth of a second."""
    return float(_levels(wave).max(initial=0.0))


def _ms(sample: int) -> int:
    return sample * 1000 // SAMPLE_RATE


def _levels(wave: np.ndarray) -> np.ndarray:
    """Root mean square of each tenth of a second; the last may be shorter."""
    filled = np.pad(wave, (0, -len(wave) % _BLOCK)).reshape(-1, _BLOCK).astype(np.float64)
    return np.sqrt((filled**2).mean(1))


def _quietest(wave: np.ndarray) -> int:
    """The middle of the quietest 0.3 s of the second half; of several the last."""
    levels = _levels(wave)
    around = np.convolve(levels, np.ones(3), "same")
    half = len(levels) // 2
    late_first = around[half : len(levels) - 1][::-1]
    block = len(levels) - 2 - int(late_first.argmin())
    return block * _BLOCK + _BLOCK // 2


def _worth_hearing(resume_s: float, length_s: float) -> bool:
    """Whether the piece moved on, and enough of it is left."""
    return resume_s >= _SHORTEST_S and length_s - resume_s >= _SHORTEST_S


def _rest(piece: Piece, heard: _Heard) -> Piece | None:
    """What of a piece is to be heard again: its end was cut off."""
    if heard.resume_s is None:
        return None
    at = round(heard.resume_s * SAMPLE_RATE)
    return Piece(piece.start + at, piece.wave[at:])
