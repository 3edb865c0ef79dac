"""One adapter for encoders of transformers: VideoMAE and V-JEPA 2, wav2vec 2.0 and kin, text models."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmp.errors import UserError
from lmp.films.encoders.base import Kind

SAMPLE_RATE = 16_000
LONGEST_SOUND_S = 30
EXAMPLES = {"picture": "VideoMAE or V-JEPA 2", "sound": "wav2vec 2.0 or WavLM", "words": "BART or BERT"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TransformersEncoder:
    """A transformers model whose last hidden states are averaged over the tokens that are not padding; K = 1.

    Sound longer than `LONGEST_SOUND_S` is encoded in pieces, whose tokens are averaged together. Text beyond
    the longest input of the model is cut off. Runs without gradients, in float32.

    Args:
        kind: what the model encodes.
        source: a local folder saved with `save_pretrained`, or a name on the hub.
        family: the model type that the user expects; None takes any.
        batch_size: shots (or pieces of sound) per forward pass.

    Raises:
        UserError: no such folder or name, files missing from it, or a model that does not encode this kind.
    """

    tokens = 1

    def __init__(
        self,
        kind: Kind,
        source: str,
        *,
        family: str | None = None,
        batch_size: int = 8,
        device: str | torch.device = "cpu",
    ) -> None:
        import transformers

        self.kind: Kind = kind
        self._batch_size = batch_size
        self._device = torch.device(device)
        folder = Path(source).expanduser()
        if source.startswith(("/", "~", ".")) and not folder.is_dir():
            raise UserError(f"no folder {source} with a {kind} encoder", remedy="give the folder of a saved model")
        self._source = str(folder) if folder.is_dir() else source
        self.name = folder.name if folder.is_dir() else source
        model = self._load(transformers.AutoModel)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self._model = model.to(self._device, torch.float32).eval().requires_grad_(False)
        self._config = model.config
        self._check_kind()
        if family is not None and family not in _names(self._config.model_type):
            raise UserError(
                f"{source} is a {self._config.model_type} model, not {family}",
                remedy=f"write {kind}:{source}, or give the folder of a {family} model",
            )
        self.width = int(self._config.hidden_size)
        self.version = self._version()
        self.frames, self.height = 0, 0
        if kind == "picture":
            self._picture = _PictureInput.read(self._source, self._config)
            self.frames, self.height = self._picture.frames, self._picture.size
        elif kind == "sound":
            self._normalise, self._mask_sound = _read_sound_input(self._load(transformers.AutoFeatureExtractor))
        else:
            self._tokenizer = self._load(transformers.AutoTokenizer)
            self._check_tokenizer()
            self._longest_text = _longest_text(self._tokenizer, self._config)

    @torch.no_grad()
    def encode(self, shots: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Features [n, 1, D] float32 and valid [n] bool, on the CPU; see `Encoder.encode`."""
        valid = [_is_something(shot) for shot in shots]
        features_nKD = torch.zeros(len(shots), 1, self.width)
        owners: list[int] = []
        pieces: list[Any] = []
        for i, shot in enumerate(shots):
            for piece in self._pieces(shot) if valid[i] else ():
                owners.append(i)
                pieces.append(piece)
        weight_n = torch.zeros(len(shots))
        for batch in self._batches([len(piece) for piece in pieces]):
            hidden_BTD, mask_BT = self._forward([pieces[j] for j in batch])
            owner_B = torch.tensor([owners[j] for j in batch])
            features_nKD[:, 0].index_add_(0, owner_B, (hidden_BTD * mask_BT[..., None]).sum(1).cpu())
            weight_n.index_add_(0, owner_B, mask_BT.sum(1).float().cpu())
        features_nKD /= weight_n.clamp(min=1)[:, None, None]
        return features_nKD, torch.tensor(valid, dtype=torch.bool) & (weight_n > 0)

    def describe(self) -> dict[str, Any]:
        """Name, version, tokens, width and sampling, as JSON."""
        sampling: dict[str, Any]
        if self.kind == "picture":
            sampling = {"frames": self.frames, "height": self.height}
        elif self.kind == "sound":
            sampling = {"rate": SAMPLE_RATE, "piece_s": LONGEST_SOUND_S, "normalise": self._normalise}
        else:
            sampling = {"longest": self._longest_text}
        return {
            "name": self.name,
            "version": self.version,
            "kind": self.kind,
            "model_type": str(self._config.model_type),
            "tokens": self.tokens,
            "width": self.width,
            "pooling": "mean",
            "sampling": sampling,
        }

    def _load(self, auto: Any) -> Any:
        try:
            return auto.from_pretrained(self._source)
        # Loaders raise OSError for missing files, and ValueError, KeyError and more for bad ones.
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            what = {"AutoModel": "model", "AutoTokenizer": "tokenizer"}.get(auto.__name__, "feature extractor")
            raise UserError(
                f"cannot load the {what} of {self.kind} encoder {self._source}: {reason}",
                remedy="give a hub name or a folder saved with save_pretrained (model and processor)",
            ) from error

    def _check_kind(self) -> None:
        inputs = {"picture": ("pixel_values", "pixel_values_videos"), "sound": ("input_values",)}
        wanted = inputs.get(self.kind, ("input_ids",))
        self._arguments = inspect.signature(self._model.forward).parameters
        # Models of several towers have no one width; models of spectrograms have no filters over the wave.
        needs = ("hidden_size", "conv_kernel") if self.kind == "sound" else ("hidden_size",)
        takes = any(name in self._arguments for name in wanted)
        if not takes or not all(hasattr(self._config, name) for name in needs):
            raise UserError(
                f"{self._source} is a {self._config.model_type} model, which does not encode {self.kind}",
                remedy=f"give one of the kind of {EXAMPLES[self.kind]}",
            )

    def _check_tokenizer(self) -> None:
        # Without tokenizer files transformers silently makes a tokenizer of the special tokens alone.
        known = len(set(self._tokenizer.get_vocab()) - set(self._tokenizer.all_special_tokens))
        if not known or len(self._tokenizer) > self._config.vocab_size:
            what = f"{len(self._tokenizer)} tokens, the model {self._config.vocab_size}" if known else "no words"
            raise UserError(
                f"the tokenizer of {self._source} has {what}",
                remedy="save the tokenizer that belongs to the model in the same folder",
            )

    def _version(self) -> str:
        """The revision on the hub, or else a digest of the weights: equal versions mean equal features."""
        commit = getattr(self._config, "_commit_hash", None)
        if commit:
            return str(commit)
        digest = hashlib.sha256(self._config.to_json_string().encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def _pieces(self, shot: Any) -> list[Any]:
        if self.kind != "sound":
            return [shot]
        wave = np.nan_to_num(np.asarray(shot, dtype=np.float32))
        if self._normalise:
            wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
        longest = LONGEST_SOUND_S * SAMPLE_RATE
        count = -(-len(wave) // longest)
        return np.array_split(wave, count)

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        # Neighbours in length share a batch, so that little is padding. A sound model without a mask gets
        # none: its group norm would take padding for silence in the shot.
        pure = self.kind == "sound" and not self._mask_sound
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for _, same in groupby(order, key=lambda piece: lengths[piece] if pure else 0):
            group = list(same)
            for start in range(0, len(group), self._batch_size):
                yield group[start : start + self._batch_size]

    def _forward(self, pieces: list[Any]) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, D] and which tokens count [B, T]."""
        if self.kind == "picture":
            return self._forward_picture(pieces)
        if self.kind == "sound":
            return self._forward_sound(pieces)
        inputs = self._tokenizer(
            pieces, padding=True, truncation=True, max_length=self._longest_text, return_tensors="pt"
        ).to(self._device)
        mask_BT = inputs["attention_mask"]
        hidden_BTD = self._model(input_ids=inputs["input_ids"], attention_mask=mask_BT).last_hidden_state
        return hidden_BTD, mask_BT

    def _forward_picture(self, pieces: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        pixels_BNchw = torch.stack([self._picture(shot) for shot in pieces]).to(self._device)
        if "pixel_values_videos" in self._arguments:
            extra = {"skip_predictor": True} if "skip_predictor" in self._arguments else {}
            hidden_BTD = self._model(pixel_values_videos=pixels_BNchw, **extra).last_hidden_state
        else:
            hidden_BTD = self._model(pixel_values=pixels_BNchw).last_hidden_state
        return hidden_BTD, hidden_BTD.new_ones(hidden_BTD.shape[:2])

    def _forward_sound(self, pieces: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        shortest = _shortest_sound(self._config)
        lengths = [max(len(piece), shortest) for piece in pieces]
        wave_BT = torch.zeros(len(pieces), max(lengths), device=self._device)
        for row, piece in enumerate(pieces):
            wave_BT[row, : len(piece)] = torch.from_numpy(np.ascontiguousarray(piece))
        length_B = torch.tensor(lengths, device=self._device)
        heard_BT = torch.arange(max(lengths), device=self._device) < length_B[:, None]
        # Models with a group norm were trained without a mask: they are told nothing of the padding.
        mask = heard_BT.long() if self._mask_sound else None
        hidden_BTD = self._model(input_values=wave_BT, attention_mask=mask).last_hidden_state
        tokens_B = self._model._get_feat_extract_output_lengths(length_B)
        return hidden_BTD, torch.arange(hidden_BTD.shape[1], device=self._device) < tokens_B[:, None]


def _names(model_type: str) -> tuple[str, ...]:
    return (model_type, "ast") if model_type == "audio-spectrogram-transformer" else (model_type,)


def _is_something(shot: Any) -> bool:
    return shot is not None and len(shot.strip() if isinstance(shot, str) else shot) > 0


class _PictureInput:
    """Frames [N, h, w, 3] uint8 -> the pixels [frames, 3, size, size] a model was trained on.

    Does what the processors do (shorter side to `size`, centre cut, normalisation) without torchvision.
    """

    def __init__(self, *, frames: int, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.frames, self.size = frames, size
        self._mean_c11 = torch.tensor(mean).view(3, 1, 1)
        self._std_c11 = torch.tensor(std).view(3, 1, 1)

    @classmethod
    def read(cls, source: str, config: Any) -> _PictureInput:
        settings = _processor_settings(source)
        size = getattr(config, "image_size", None) or getattr(config, "crop_size", None) or 224
        frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
        if not frames:
            raise UserError(
                f"{source} is a {config.model_type} model, which does not take several frames",
                remedy="give a video model such as VideoMAE or V-JEPA 2",
            )
        return cls(
            frames=int(frames),
            size=int(size if isinstance(size, int) else size[0]),
            mean=settings.get("image_mean", IMAGENET_MEAN),
            std=settings.get("image_std", IMAGENET_STD),
        )

    def __call__(self, shot: np.ndarray) -> Tensor:
        # A shot of fewer frames than wanted repeats some of them.
        chosen = np.linspace(0, len(shot) - 1, self.frames).round().astype(int)
        pixels_Nchw = torch.from_numpy(np.ascontiguousarray(shot[chosen])).permute(0, 3, 1, 2).float() / 255
        height, width = pixels_Nchw.shape[2:]
        scale = self.size / min(height, width)
        new = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
        pixels_Nchw = F.interpolate(pixels_Nchw, new, mode="bilinear", antialias=True, align_corners=False)
        top, left = (new[0] - self.size) // 2, (new[1] - self.size) // 2
        cut_Nchw = pixels_Nchw[:, :, top : top + self.size, left : left + self.size]
        return (cut_Nchw - self._mean_c11) / self._std_c11


def _processor_settings(source: str) -> dict[str, Any]:
    from transformers.utils import cached_file

    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            settings: dict[str, Any] = json.loads(Path(found).read_text(encoding="utf-8"))
            return settings
    return {}


def _read_sound_input(extractor: Any) -> tuple[bool, bool]:
    """Whether a shot is brought to zero mean and unit variance, and whether the model is given a mask."""
    if extractor.sampling_rate != SAMPLE_RATE:
        raise UserError(
            f"the sound encoder wants {extractor.sampling_rate} Hz, films are read at {SAMPLE_RATE}",
            remedy=f"give a model for {SAMPLE_RATE} Hz",
        )
    return bool(getattr(extractor, "do_normalize", False)), bool(extractor.return_attention_mask)


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
