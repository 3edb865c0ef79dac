"""One adapter for encoders of transformers: pictures, sound and words."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmp.errors import UserError
from lmp.films.encoders import saved
from lmp.films.encoders.base import Kind
from lmp.films.encoders.device import exact
from lmp.films.encoders.sentences import read_sentences
from lmp.films.encoders.transformers_inputs import Input, Words
from lmp.films.encoders.transformers_pictures import FRAMES_OF_A_TOKEN, Clips, Frames, WholeClips, own_frames
from lmp.films.encoders.transformers_sound import Extracted, Spectra, Waves

EXAMPLES = {
    "picture": "VideoMAE, V-JEPA 2, VideoPrism, Perception Encoder, CLIP or SigLIP",
    "sound": "wav2vec 2.0, WavLM, Whisper, AST, CLAP or Perception Encoder",
    "words": "BART or BERT",
}
MODEL_TYPES: dict[str, tuple[str, ...]] = {  # of transformers, that a family goes by, if not its name
    "ast": ("audio-spectrogram-transformer",),
    "clap": ("clap", "clap_audio_model"),
    "clip": ("clip", "clip_vision_model"),
    "siglip": ("siglip", "siglip_vision_model"),
    "videoprism": ("videoprism", "videoprism_vision_model"),
    "pe_video": ("pe_video", "pe_video_encoder", "pe_audio_video"),
    "pe_audio": ("pe_audio", "pe_audio_encoder", "pe_audio_video"),
}
_HEARS = {"input_values", "input_features"}
_SPECTRA = ("whisper", "audio-spectrogram-transformer", "clap", "clap_audio_model")


class TransformersEncoder:
    """A transformers model whose last hidden states are averaged over the tokens that are not padding.

    A model that ends in one vector for a picture, a clip or a piece of sound gives that one, and `Sentences` may say
    otherwise for a text. With K > 1 they are averaged over K parts of the shot: equal parts of its sound, of its frames
    or tubelets, or of its text's tokens (neighbours share what does not divide). Sound longer than the model takes is
    encoded in pieces, whose tokens are averaged together; text beyond its longest input is cut off. Runs
    without gradients, in float32.

    Args:
        kind: what the model encodes.
        source: a local folder saved with `save_pretrained`, or a name on the hub.
        family: the model type that the user expects; None takes any.
        tokens: K.
        frames: of a shot for each token, for a model of single pictures or of clips of any length.
        pooling, normalize, prompt, prefix: of texts, see `read_sentences`.
        batch_size: shots (or pieces of them) per forward pass.

    Raises:
        UserError: no such folder or name, files missing from it, or a model that does not encode this kind.
    """

    rate = 0.0

    def __init__(
        self,
        kind: Kind,
        source: str,
        *,
        family: str | None = None,
        tokens: int = 1,
        frames: int | None = None,
        pooling: str | None = None,
        normalize: bool | None = None,
        prompt: str | None = None,
        prefix: str | None = None,
        batch_size: int = 8,
        device: str | torch.device = "cpu",
    ) -> None:
        import transformers

        self.kind: Kind = kind
        self.tokens = tokens
        self._batch_size = batch_size
        self._source, self.name = saved.find(source, role=self._role)
        config = self._load(transformers.AutoConfig)
        self._model_type = str(config.model_type)
        if family is not None and self._model_type not in MODEL_TYPES.get(family, (family,)):
            raise UserError(
                f"{source} is a {self._model_type} model, not {family}",
                remedy=f"write {kind}:{source}, or give the folder of a {family} model",
            )
        model = self._load_model(config)
        self._model = model.to(device, torch.float32).eval().requires_grad_(False)
        self.version = saved.version(self._model, self._source)
        texts = {"pooling": pooling, "normalize": normalize, "prompt": prompt, "prefix": prefix}
        self._input = self._input_of(frames, texts)
        self.width = self._input.width
        self.frames, self.height = self._input.frames, self._input.height

    @exact()
    @torch.no_grad()
    def encode(self, shots: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Features [n, K, D] float32 and valid [n] bool, on the CPU; see `Encoder.encode`."""
        valid = [_is_something(shot) for shot in shots]
        sums_nKD = torch.zeros(len(shots), self.tokens, self.width)
        weight_nK = torch.zeros(len(shots), self.tokens)
        owners: list[tuple[int, int]] = []
        pieces: list[Any] = []
        for i, shot in enumerate(shots):
            for token, piece in self._input.pieces(shot, self.tokens) if valid[i] else ():
                owners.append((i, token))
                pieces.append(piece)
        for batch in self._batches([len(piece) for piece in pieces]):
            hidden_BTD, weight_BT = self._input([pieces[j] for j in batch])
            hidden_BTD, weight_BT = hidden_BTD.float().cpu(), weight_BT.float().cpu()
            for row, (shot_row, token) in enumerate(owners[j] for j in batch):
                if self._input.per_piece:
                    sums_nKD[shot_row, token] += weight_BT[row] @ hidden_BTD[row]
                    weight_nK[shot_row, token] += weight_BT[row].sum()
                elif (heard_TD := hidden_BTD[row][weight_BT[row] > 0]).numel():
                    sums_nKD[shot_row] = F.adaptive_avg_pool1d(heard_TD.T, self.tokens).T
                    weight_nK[shot_row] = 1
        features_nKD = sums_nKD / torch.where(weight_nK > 0, weight_nK, 1)[..., None]
        return self._input.finish(features_nKD), torch.tensor(valid, dtype=torch.bool) & (weight_nK > 0).all(1)

    def describe(self) -> dict[str, Any]:
        """Name, version, tokens, width and sampling, as JSON."""
        return {
            "name": self.name,
            "version": self.version,
            "kind": self.kind,
            "model_type": self._model_type,
            "tokens": self.tokens,
            "width": self.width,
            "pooling": self._input.pooling,
            "sampling": self._input.sampling(),
        }

    @property
    def _role(self) -> str:
        return f"{self.kind} encoder"

    def _load(self, auto: Any) -> Any:
        return saved.load(auto, self._source, role=self._role)

    def _load_model(self, config: Any) -> Any:
        """The model, without what does not encode this kind: a decoder, or Perception Encoder's other towers."""
        import transformers

        auto, options = transformers.AutoModel, {}
        if config.model_type == "pe_audio_video" and self.kind == "sound":
            auto, options = transformers.PeAudioModel, {"config": config.audio_config}
        elif config.model_type == "pe_audio_video" and self.kind == "picture":
            auto, options = transformers.PeVideoModel, {"config": config.video_config}
        return saved.load_model(
            auto,
            self._source,
            role=self._role,
            part=lambda model: model.get_encoder() if model.config.is_encoder_decoder else model,
            **options,
        )

    def _input_of(self, frames: int | None, texts: dict[str, Any]) -> Input:
        """How the model takes shots of its kind."""
        if self.kind == "picture":
            made = self._pictures(frames)
        else:
            made = self._sound() if self.kind == "sound" else self._words(texts)
        if made is None:
            raise UserError(
                f"{self._source} is a {self._model_type} model, which does not encode {self.kind} here",
                remedy=f"give one of the kind of {EXAMPLES[self.kind]}",
            )
        return made

    def _pictures(self, frames: int | None) -> Input | None:
        model, config = self._model, self._model.config
        arguments, one_tower = self._arguments()
        vision = getattr(config, "vision_config", None)
        whole = hasattr(model, "get_video_features") and getattr(vision, "num_frames", None)
        if whole or config.model_type in ("pe_video", "pe_video_encoder"):
            return WholeClips(model, self._source, tokens=self.tokens, frames=frames)
        if "spatial_shapes" in arguments:
            return None
        clip = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
        if clip and one_tower and arguments.keys() & {"pixel_values", "pixel_values_videos"}:
            if frames is not None:
                raise own_frames(self._source)
            return Clips(model, self._source)
        if hasattr(model, "get_image_features") or (one_tower and "pixel_values" in arguments):
            return Frames(model, self._source, (frames or FRAMES_OF_A_TOKEN) * self.tokens)
        return None

    def _sound(self) -> Input | None:
        import transformers

        model, config = self._model, self._model.config
        arguments, one_tower = self._arguments()
        perception = hasattr(model, "audio_encoder") and hasattr(model, "audio_head")
        if not (perception or config.model_type in _SPECTRA or (one_tower and arguments.keys() & _HEARS)):
            return None
        extractor = self._load(transformers.AutoFeatureExtractor)
        if not hasattr(extractor, "sampling_rate"):
            return None
        if config.model_type in _SPECTRA:
            return Spectra(model, extractor)
        if hasattr(config, "conv_kernel") and "input_values" in arguments:
            return Waves(model, extractor, self._source)
        return Extracted(model, extractor)

    def _words(self, texts: dict[str, Any]) -> Input | None:
        import transformers

        arguments, one_tower = self._arguments()
        if not one_tower or "input_ids" not in arguments:
            return None
        tokenizer = self._load(transformers.AutoTokenizer)
        self._check_tokenizer(tokenizer)
        return Words(self._model, tokenizer, read_sentences(self._source, **texts))

    def _arguments(self) -> tuple[Any, bool]:
        """What the model is called with, and whether it is one tower: one of several has no one width."""
        return inspect.signature(self._model.forward).parameters, hasattr(self._model.config, "hidden_size")

    def _check_tokenizer(self, tokenizer: Any) -> None:
        # Without tokenizer files transformers silently makes a tokenizer of the special tokens alone.
        known = len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
        vocabulary = self._model.config.vocab_size
        if not known or len(tokenizer) > vocabulary:
            what = f"{len(tokenizer)} tokens, the model {vocabulary}" if known else "no words"
            raise UserError(
                f"the tokenizer of {self._source} has {what}",
                remedy="save the tokenizer that belongs to the model in the same folder",
            )

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        # Neighbours in length share a batch, so that little is padding.
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for _, same in groupby(order, key=lambda piece: lengths[piece] if self._input.alike else 0):
            group = list(same)
            for start in range(0, len(group), self._batch_size):
                yield group[start : start + self._batch_size]


def _is_something(shot: Any) -> bool:
    return shot is not None and len(shot.strip() if isinstance(shot, str) else shot) > 0
