"""Sound as the models of transformers take it; see `transformers_inputs`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmp.errors import UserError
from lmp.films.encoders.base import SAMPLE_RATE
from lmp.films.encoders.transformers_inputs import Input, pooled

LONGEST_SOUND_S = 30


class _Sound(Input):
    """A shot is cut into K equal parts, and each of them into pieces that the model takes."""

    per_piece = True

    def __init__(self, model: Any, extractor: Any, *, width: int, longest: int) -> None:
        super().__init__(model, width=width)
        self._extractor = extractor
        self._rate = int(extractor.sampling_rate)
        self._longest = longest

    def pieces(self, shot: Any, tokens: int) -> list[tuple[int, Any]]:
        wave = self._prepared(np.nan_to_num(np.asarray(shot, dtype=np.float32)))
        cut = []
        for token, part in enumerate(np.array_split(wave, tokens)):
            part = part if len(part) else wave[-1:]  # fewer samples than tokens
            cut += [(token, piece) for piece in np.array_split(part, -(-len(part) // self._longest))]
        return cut

    def _prepared(self, wave: np.ndarray) -> np.ndarray:
        return wave


class Waves(_Sound):
    """Sound as it is: wav2vec 2.0, WavLM, HuBERT. What their feature extractor does to an utterance, a shot gets."""

    def __init__(self, model: Any, extractor: Any, source: str) -> None:
        if extractor.sampling_rate != SAMPLE_RATE:
            raise UserError(
                f"the sound encoder {source} wants {extractor.sampling_rate} Hz, films are read at {SAMPLE_RATE}",
                remedy=f"give a model for {SAMPLE_RATE} Hz",
            )
        width = int(model.config.hidden_size)
        super().__init__(model, extractor, width=width, longest=LONGEST_SOUND_S * SAMPLE_RATE)
        self._normalise = bool(getattr(extractor, "do_normalize", False))
        self._mask = bool(extractor.return_attention_mask)
        # A model without a mask gets no padding: its group norm would take it for silence in the shot.
        self.alike = not self._mask
        self._shortest = _shortest_sound(model.config)

    def _prepared(self, wave: np.ndarray) -> np.ndarray:
        return (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7) if self._normalise else wave

    def __call__(self, pieces: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        lengths = [max(len(piece), self._shortest) for piece in pieces]
        wave_BT = torch.zeros(len(pieces), max(lengths))
        for row, piece in enumerate(pieces):
            wave_BT[row, : len(piece)] = torch.from_numpy(np.ascontiguousarray(piece))
        length_B = torch.tensor(lengths)
        mask_BT = (torch.arange(max(lengths)) < length_B[:, None]).long().to(self.model.device)
        hidden_BTD = self.model(
            input_values=wave_BT.to(self.model.device), attention_mask=mask_BT if self._mask else None
        ).last_hidden_state
        tokens_B = self.model._get_feat_extract_output_lengths(length_B)
        return hidden_BTD, torch.arange(hidden_BTD.shape[1]) < tokens_B[:, None]

    def sampling(self) -> dict[str, Any]:
        return {"rate": SAMPLE_RATE, "piece_s": LONGEST_SOUND_S, "normalise": self._normalise}


class Spectra(_Sound):
    """Spectrograms of a fixed length, made by the model's feature extractor: Whisper, AST, CLAP.

    Whisper gives a vector for every 20 ms of sound, the others one for a piece. A model for another rate than
    16 kHz gets the sound resampled: films are read at 16 kHz, so nothing is above 8 kHz.
    """

    def __init__(self, model: Any, extractor: Any) -> None:
        self._whole = getattr(model, "get_audio_features", None)
        config = model.config
        width = int(config.projection_dim if self._whole else config.hidden_size)
        lengths = [getattr(extractor, name, None) for name in ("n_samples", "nb_max_samples")]
        frames = getattr(extractor, "max_length", 0)
        longest = next((int(n) for n in lengths if n), int(frames * extractor.sampling_rate // 100))
        super().__init__(model, extractor, width=width, longest=longest)
        self._stepwise = config.model_type == "whisper"
        self._shortest = self._rate // 40  # one window of 25 ms

    def _prepared(self, wave: np.ndarray) -> np.ndarray:
        return wave if self._rate == SAMPLE_RATE else _resampled(wave, self._rate)

    def __call__(self, pieces: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        filled = [np.pad(piece, (0, max(0, self._shortest - len(piece)))) for piece in pieces]
        made = self._extractor(filled, sampling_rate=self._rate, return_tensors="pt")
        name = self._extractor.model_input_names[0]
        inputs = {name: made[name].to(self.model.device, torch.float32)}
        if "is_longer" in made:  # CLAP's extractor names one of the pieces by chance; none is longer
            inputs["is_longer"] = torch.zeros(len(pieces), 1, dtype=torch.bool, device=self.model.device)
        length_B = torch.tensor([len(piece) for piece in filled])
        if self._stepwise:
            hidden_BTD = self.model(**inputs).last_hidden_state
            tokens_B = -(-length_B // (2 * self._extractor.hop_length))
            return hidden_BTD, torch.arange(hidden_BTD.shape[1]) < tokens_B[:, None]
        pooled_BD = pooled(self._whole(**inputs) if self._whole else self.model(**inputs))
        return pooled_BD[:, None], length_B[:, None].float()

    def sampling(self) -> dict[str, Any]:
        return {"rate": self._rate, "piece_s": self._longest / self._rate}


class Extracted(_Sound):
    """Whatever the model's feature extractor makes of sound: Perception Encoder, wav2vec 2.0 BERT.

    Pieces of one length share a batch, so that nothing is padding. Perception Encoder (Vyas et al., 2025) gives a
    piece's vector in the space that it shares with text, or, the one that is trained for it, a vector every 40 ms.
    """

    alike = True

    def __init__(self, model: Any, extractor: Any) -> None:
        self._head = getattr(model, "audio_head", None)
        self._encoder = getattr(model, "audio_encoder", model)
        width = self._encoder.config.hidden_size if self._head is None else self._head.proj.out_features
        rate = int(extractor.sampling_rate)
        super().__init__(model, extractor, width=int(width), longest=LONGEST_SOUND_S * rate)
        stepwise = "PeAudioFrameLevelModel" in (model.config.architectures or ())
        self._pooled = self._encoder.config.model_type == "pe_audio_encoder" and not stepwise
        self._arguments = inspect.signature(self._encoder.forward).parameters
        self._shortest = rate // 10

    def _prepared(self, wave: np.ndarray) -> np.ndarray:
        return wave if self._rate == SAMPLE_RATE else _resampled(wave, self._rate)

    def __call__(self, pieces: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        filled = [np.pad(piece, (0, max(0, self._shortest - len(piece)))) for piece in pieces]
        made = self._extractor(filled, sampling_rate=self._rate, return_tensors="pt")
        inputs = {name: made[name].to(self.model.device) for name in made if name in self._arguments}
        told = self._encoder(**inputs)
        hidden_BTD = told.pooler_output[:, None] if self._pooled else told.last_hidden_state
        if self._head is not None:
            hidden_BTD = self._head(hidden_BTD)
        weight = float(len(filled[0])) if self._pooled else 1.0
        return hidden_BTD, hidden_BTD.new_full(hidden_BTD.shape[:2], weight)

    def sampling(self) -> dict[str, Any]:
        return {"rate": self._rate, "piece_s": LONGEST_SOUND_S, "vectors": "one a piece" if self._pooled else "steps"}


def _resampled(wave: np.ndarray, rate: int) -> np.ndarray:
    import av

    resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
    frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
    frame.sample_rate = SAMPLE_RATE
    made: Sequence[Any] = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([part.to_ndarray()[0] for part in made])


def _shortest_sound(config: Any) -> int:
    """Samples that give two tokens, the least that every model of the family takes."""
    samples = 2
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples
