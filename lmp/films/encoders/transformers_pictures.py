"""Pictures as the models of transformers take them; see `transformers_inputs`."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmp.errors import UserError
from lmp.films.encoders import saved
from lmp.films.encoders.base import spread
from lmp.films.encoders.transformers_inputs import Input, pooled

FRAMES_OF_A_TOKEN = 4  # shown to a model of single pictures, unless told
FRAMES_OF_A_CLIP = 16  # shown to a model of clips of any length, unless told
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as processors save them


class Clips(Input):
    """Clips of a fixed number of frames, vectors of their patches: VideoMAE, V-JEPA 2, VideoPrism."""

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


class WholeClips(Input):
    """Clips of a fixed number of frames, one vector each: VideoPrism with text, Perception Encoder.

    The vector is that of the space which the model shares with text. A shot gives K clips, one from each part of it.
    """

    per_piece = True

    def __init__(self, model: Any, source: str, *, tokens: int, frames: int | None) -> None:
        self._encoder, self._head = getattr(model, "video_encoder", None), getattr(model, "video_head", None)
        if self._encoder is None and model.config.model_type == "pe_video_encoder":
            self._encoder = model
        vision = getattr(model.config, "vision_config", None) or (self._encoder or model).config
        if self._encoder is None:
            width = getattr(model.config, "projection_dim", None) or vision.hidden_size
        else:
            width = vision.hidden_size if self._head is None else self._head.proj.out_features
        super().__init__(model, width=int(width))
        self._clip = frames or FRAMES_OF_A_CLIP if self._encoder is not None else int(vision.num_frames)
        if frames not in (None, self._clip):
            raise own_frames(source)
        self._picture = Picture.read(source, getattr(vision, "vision_config", vision))
        self.frames, self.height = self._clip * tokens, self._picture.height

    def pieces(self, shot: Any, tokens: int) -> list[tuple[int, Any]]:
        return list(enumerate(np.split(spread(shot, self.frames), tokens)))

    def __call__(self, pieces: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        pixels_BNchw = torch.stack([self._picture(clip) for clip in pieces]).to(self.model.device)
        if self._encoder is None:
            told_BD = pooled(self.model.get_video_features(pixel_values_videos=pixels_BNchw))
        else:
            told_BD = self._encoder(pixel_values_videos=pixels_BNchw).pooler_output
            told_BD = told_BD if self._head is None else self._head(told_BD)
        told_B1D = told_BD.reshape(len(pieces), 1, -1)
        return told_B1D, told_B1D.new_ones(told_B1D.shape[:2])

    def sampling(self) -> dict[str, Any]:
        return {"frames": self._clip, **self._picture.settings()}


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
        hidden_BND = pooled(told).unflatten(0, (len(pieces), self.frames))
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
        plain = settings.get("do_normalize") is False
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
            norm=((0.0,) * 3, (1.0,) * 3)
            if plain
            else (settings.get("image_mean") or IMAGENET_MEAN, settings.get("image_std") or IMAGENET_STD),
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


def _size(saved: Any, default: Any) -> Any:
    """An int for the shorter side, or height and width."""
    if isinstance(saved, dict):
        return int(saved["shortest_edge"]) if "shortest_edge" in saved else (int(saved["height"]), int(saved["width"]))
    return default if saved is None else int(saved)


def own_frames(source: str) -> UserError:
    """For the option `frames` of a model that has a number of its own."""
    return UserError(f"{source} has its own number of frames", remedy="leave the option frames out")


def _processor_settings(source: str) -> dict[str, Any]:
    for name in ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json"):
        settings = saved.read_json(source, name) or {}
        settings = settings.get("video_processor") or settings.get("image_processor") or settings
        if settings and "sampling_rate" not in settings:  # of sound, where a model takes both
            return settings
    return {}
