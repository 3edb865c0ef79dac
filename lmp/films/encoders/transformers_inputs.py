"""What the models of transformers are given and what they give back, by the way they take a shot.

Each does its family's published preprocessing, without torchvision or torchaudio. Called with pieces of
shots, it gives hidden states [B, T, D] in order of time and weights [B, T], 0 for padding.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmp.errors import UserError
from lmp.films.encoders.base import SAMPLE_RATE, spread

LONGEST_SOUND_S = 30
FRAMES_OF_A_TOKEN = 4  # shown to a model of single pictures, unless told
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as processors save them


class Input(ABC):
    """One way of giving shots to a model.

    Attributes:
        width: D.
        frames, height: of the pictures wanted; 0 unless pictures.
        alike: whether only pieces of one length may share a batch.
        per_piece: whether a piece belongs to one token of its shot; otherwise it is a whole shot.
    """

    frames = 0
    height = 0
    alike = False
    per_piece = False

    def __init__(self, model: Any, *, width: int) -> None:
        self.model = model
        self.width = width

    def pieces(self, shot: Any, tokens: int) -> list[tuple[int, Any]]:
        """Of a shot, pieces and the token that each belongs to."""
        return [(0, shot)]

    @abstractmethod
    def __call__(self, pieces: list[Any]) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, D] and weights [B, T]."""

    @abstractmethod
    def sampling(self) -> dict[str, Any]:
        """How a shot is sampled, as JSON."""


class Words(Input):
    """Text, cut off at the longest input of the model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, width=int(model.config.hidden_size))
        self._tokenizer = tokenizer
        self._longest = _longest_text(tokenizer, model.config)

    def __call__(self, pieces: list[str]) -> tuple[Tensor, Tensor]:
        inputs = self._tokenizer(
            pieces, padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        ).to(self.model.device)
        mask_BT = inputs["attention_mask"]
        return self.model(input_ids=inputs["input_ids"], attention_mask=mask_BT).last_hidden_state, mask_BT

    def sampling(self) -> dict[str, Any]:
        return {"longest": self._longest}


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
        pooled_BD = _pooled(self._whole(**inputs) if self._whole else self.model(**inputs))
        return pooled_BD[:, None], length_B[:, None].float()

    def sampling(self) -> dict[str, Any]:
        return {"rate": self._rate, "piece_s": self._longest / self._rate}


class Clips(Input):
    """Clips of a fixed number of frames: VideoMAE, V-JEPA 2."""

    def __init__(self, model: Any, source: str) -> None:
        config = model.config
        super().__init__(model, width=int(config.hidden_size))
        self._picture = Picture.read(source, config)
        self.frames = int(getattr(config, "num_frames", None) or config.frames_per_clip)
        self.height = self._picture.height
        arguments = inspect.signature(model.forward).parameters
        self._name = next(name for name in ("pixel_values_videos", "pixel_values") if name in arguments)
        self._extra = {"skip_predictor": True} if "skip_predictor" in arguments else {}

    def __call__(self, pieces: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        pixels_BNchw = torch.stack([self._picture(spread(shot, self.frames)) for shot in pieces])
        inputs = {self._name: pixels_BNchw.to(self.model.device), **self._extra}
        hidden_BTD = self.model(**inputs).last_hidden_state
        return hidden_BTD, hidden_BTD.new_ones(hidden_BTD.shape[:2])

    def sampling(self) -> dict[str, Any]:
        return {"frames": self.frames, **self._picture.settings()}


class Frames(Input):
    """Single pictures, one vector each: CLIP, SigLIP (and SigLIP 2 of a fixed resolution), DINO."""

    def __init__(self, model: Any, source: str, frames: int) -> None:
        self._whole = getattr(model, "get_image_features", None)
        config = model.config
        vision = getattr(config, "vision_config", config)
        super().__init__(model, width=int(getattr(config, "projection_dim", None) or vision.hidden_size))
        self._picture = Picture.read(source, vision)
        self.frames, self.height = frames, self._picture.height

    def __call__(self, pieces: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        pixels_BNchw = torch.stack([self._picture(spread(shot, self.frames)) for shot in pieces])
        pixels_Mchw = pixels_BNchw.flatten(0, 1).to(self.model.device)
        told = self._whole(pixel_values=pixels_Mchw) if self._whole else self.model(pixel_values=pixels_Mchw)
        hidden_BND = _pooled(told).unflatten(0, (len(pieces), self.frames))
        return hidden_BND, hidden_BND.new_ones(hidden_BND.shape[:2])

    def sampling(self) -> dict[str, Any]:
        return {"frames": self.frames, **self._picture.settings()}


class Picture:
    """Frames [N, h, w, 3] uint8 -> the pixels [N, 3, H, W] a model was trained on, as its processor makes them."""

    def __init__(
        self, *, size: tuple[int, int] | int, crop: tuple[int, int] | None, resample: str, norm: tuple[Any, Any]
    ) -> None:
        self._size, self._crop, self._resample = size, crop, resample
        self.height = size if isinstance(size, int) else size[0]
        self._mean_c11, self._std_c11 = (torch.tensor(values).view(3, 1, 1) for values in norm)

    @classmethod
    def read(cls, source: str, config: Any) -> Picture:
        """The settings that were saved with a model, or else its own size and ImageNet's mean and spread."""
        settings = _processor_settings(source)
        own = getattr(config, "image_size", None) or getattr(config, "crop_size", None) or 224
        own_HW = (own, own) if isinstance(own, int) else (int(own[0]), int(own[1]))
        size = _size(settings.get("size"), min(own_HW))
        # A picture scaled by its shorter side must be cut to be of the model's size.
        cut = settings.get("do_center_crop", False) or isinstance(size, int)
        crop = _size(settings.get("crop_size"), own_HW) if cut else None
        return cls(
            size=size,
            crop=(crop, crop) if isinstance(crop, int) else crop,
            resample=_FILTERS.get(settings.get("resample", 2), "bicubic"),
            norm=(settings.get("image_mean") or IMAGENET_MEAN, settings.get("image_std") or IMAGENET_STD),
        )

    def __call__(self, frames_Nhw3: np.ndarray) -> Tensor:
        pixels_Nchw = torch.from_numpy(np.ascontiguousarray(frames_Nhw3)).permute(0, 3, 1, 2).float()
        size = self._size
        if isinstance(size, int):
            scale = size / min(pixels_Nchw.shape[2:])
            size = (max(size, int(pixels_Nchw.shape[2] * scale)), max(size, int(pixels_Nchw.shape[3] * scale)))
        if tuple(pixels_Nchw.shape[2:]) != size:
            smooth = {} if self._resample == "nearest" else {"antialias": True, "align_corners": False}
            # Processors resize pictures of 8 bits, so they round.
            pixels_Nchw = F.interpolate(pixels_Nchw, size, mode=self._resample, **smooth).round().clamp(0, 255)
        if self._crop is not None:
            top, left = ((have - want) // 2 for have, want in zip(size, self._crop, strict=True))
            pixels_Nchw = pixels_Nchw[:, :, top : top + self._crop[0], left : left + self._crop[1]]
        return (pixels_Nchw / 255 - self._mean_c11) / self._std_c11

    def settings(self) -> dict[str, Any]:
        """Height, resizing, cut and normalisation, as JSON."""
        return {
            "height": self.height,
            "resized": self._size,
            "crop": self._crop,
            "resample": self._resample,
            "mean": self._mean_c11.flatten().tolist(),
            "std": self._std_c11.flatten().tolist(),
        }


def _pooled(told: Any) -> Tensor:
    """[B, D], whatever a model calls it."""
    if isinstance(told, Tensor):
        return told
    pooled: Tensor | None = getattr(told, "pooler_output", None)
    return told.last_hidden_state[:, 0] if pooled is None else pooled


def _size(saved: Any, default: Any) -> Any:
    """An int for the shorter side, or height and width."""
    if isinstance(saved, dict):
        return int(saved["shortest_edge"]) if "shortest_edge" in saved else (int(saved["height"]), int(saved["width"]))
    return default if saved is None else int(saved)


def _processor_settings(source: str) -> dict[str, Any]:
    from transformers.utils import cached_file

    for name in ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json"):
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            settings: dict[str, Any] = json.loads(Path(found).read_text(encoding="utf-8"))
            return settings.get("video_processor") or settings.get("image_processor") or settings
    return {}


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


def _longest_text(tokenizer: Any, config: Any) -> int:
    """The longest input of the model in tokens; a tokenizer that was not told says about 1e30."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    # RoBERTa counts positions from the padding token's number on, and has that many fewer to use.
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= config.pad_token_id + 1
    return int(min(tokenizer.model_max_length, positions))
