"""One adapter for encoders of transformers: pictures, sound and words."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmp.errors import UserError
from lmp.films.encoders.base import Kind
from lmp.films.encoders.transformers_inputs import FRAMES_OF_A_TOKEN, Clips, Frames, Input, Spectra, Waves, Words
from lmp.films.encoders.weights import digest

EXAMPLES = {
    "picture": "VideoMAE, V-JEPA 2, CLIP or SigLIP",
    "sound": "wav2vec 2.0, WavLM, Whisper, AST or CLAP",
    "words": "BART or BERT",
}
_SPECTRA = ("whisper", "audio-spectrogram-transformer", "clap", "clap_audio_model")
_SHORT_NAMES = {"audio-spectrogram-transformer": "ast", "clap_audio_model": "clap"}


class TransformersEncoder:
    """A transformers model whose last hidden states are averaged over the tokens that are not padding.

    With K > 1 they are averaged over K parts of the shot: equal parts of its sound, of its frames or tubelets,
    or of its text's tokens (neighbours share what does not divide). Sound longer than the model takes is
    encoded in pieces, whose tokens are averaged together; text beyond its longest input is cut off. Runs
    without gradients, in float32.

    Args:
        kind: what the model encodes.
        source: a local folder saved with `save_pretrained`, or a name on the hub.
        family: the model type that the user expects; None takes any.
        tokens: K.
        frames: of a shot for each token, for a model of single pictures.
        batch_size: shots (or pieces of sound) per forward pass.

    Raises:
        UserError: no such folder or name, files missing from it, or a model that does not encode this kind.
    """

    def __init__(
        self,
        kind: Kind,
        source: str,
        *,
        family: str | None = None,
        tokens: int = 1,
        frames: int | None = None,
        batch_size: int = 8,
        device: str | torch.device = "cpu",
    ) -> None:
        import transformers

        self.kind: Kind = kind
        self.tokens = tokens
        self._batch_size = batch_size
        folder = Path(source).expanduser()
        if source.startswith(("/", "~", ".")) and not folder.is_dir():
            raise UserError(f"no folder {source} with a {kind} encoder", remedy="give the folder of a saved model")
        self._source = str(folder) if folder.is_dir() else source
        self.name = folder.name if folder.is_dir() else source
        model = self._load(transformers.AutoModel)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self._model = model.to(device, torch.float32).eval().requires_grad_(False)
        self._model_type = str(model.config.model_type)
        if family is not None and family not in (self._model_type, _SHORT_NAMES.get(self._model_type)):
            raise UserError(
                f"{source} is a {self._model_type} model, not {family}",
                remedy=f"write {kind}:{source}, or give the folder of a {family} model",
            )
        self._input = self._input_of(frames)
        self.width = self._input.width
        self.frames, self.height = self._input.frames, self._input.height
        self.version = self._version()

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
        return features_nKD, torch.tensor(valid, dtype=torch.bool) & (weight_nK > 0).all(1)

    def describe(self) -> dict[str, Any]:
        """Name, version, tokens, width and sampling, as JSON."""
        return {
            "name": self.name,
            "version": self.version,
            "kind": self.kind,
            "model_type": self._model_type,
            "tokens": self.tokens,
            "width": self.width,
            "pooling": "mean",
            "sampling": self._input.sampling(),
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

    def _input_of(self, frames: int | None) -> Input:
        """How the model takes shots of its kind."""
        import transformers

        model, config = self._model, self._model.config
        arguments = inspect.signature(model.forward).parameters
        one_tower = hasattr(config, "hidden_size")  # a model of several towers has no one width
        made: Input | None = None
        if self.kind == "sound" and one_tower and hasattr(config, "conv_kernel") and "input_values" in arguments:
            made = Waves(model, self._load(transformers.AutoFeatureExtractor), self._source)
        elif self.kind == "sound" and self._model_type in _SPECTRA:
            made = Spectra(model, self._load(transformers.AutoFeatureExtractor))
        elif self.kind == "words" and one_tower and "input_ids" in arguments:
            tokenizer = self._load(transformers.AutoTokenizer)
            self._check_tokenizer(tokenizer)
            made = Words(model, tokenizer)
        elif self.kind == "picture" and "spatial_shapes" not in arguments:
            clip = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
            if clip and one_tower and arguments.keys() & {"pixel_values", "pixel_values_videos"}:
                made = Clips(model, self._source)
            elif hasattr(model, "get_image_features") or (one_tower and "pixel_values" in arguments):
                return Frames(model, self._source, (frames or FRAMES_OF_A_TOKEN) * self.tokens)
        if made is None:
            raise UserError(
                f"{self._source} is a {self._model_type} model, which does not encode {self.kind} here",
                remedy=f"give one of the kind of {EXAMPLES[self.kind]}",
            )
        if frames is not None:
            raise UserError(f"{self._source} has its own number of frames", remedy="leave the option frames out")
        return made

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

    def _version(self) -> str:
        """The revision on the hub, or else a digest of the weights: equal versions mean equal features."""
        from transformers.utils import cached_file

        commit = getattr(self._model.config, "_commit_hash", None)
        if commit:
            return str(commit)
        # As it was saved: the configuration in memory also tells the version of transformers that has read it.
        return digest(self._model, Path(str(cached_file(self._source, "config.json"))).read_text(encoding="utf-8"))

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        # Neighbours in length share a batch, so that little is padding.
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for _, same in groupby(order, key=lambda piece: lengths[piece] if self._input.alike else 0):
            group = list(same)
            for start in range(0, len(group), self._batch_size):
                yield group[start : start + self._batch_size]


def _is_something(shot: Any) -> bool:
    return shot is not None and len(shot.strip() if isinstance(shot, str) else shot) > 0
