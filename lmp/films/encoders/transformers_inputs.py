"""What the models of transformers are given and what they give back, by the way they take a shot.

Each does its family's published preprocessing, without torchvision or torchaudio. Called with pieces of
shots, it gives hidden states [B, T, D] in order of time and weights [B, T], 0 for padding. Sound and pictures
are in modules of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lmp.films.encoders.sentences import Sentences


class Input(ABC):
    """One way of giving shots to a model.

    Attributes:
        width: D.
        frames, height: of the pictures wanted; 0 unless pictures.
        alike: whether only pieces of one length may share a batch.
        per_piece: whether a piece belongs to one token of its shot; otherwise it is a whole shot.
        pooling: how hidden states become one vector.
    """

    frames = 0
    height = 0
    alike = False
    per_piece = False
    pooling = "mean"

    def __init__(self, model: Any, *, width: int) -> None:
        self.model = model
        self.width = width

    def pieces(self, shot: Any, tokens: int) -> list[tuple[int, Any]]:
        """Of a shot, pieces and the token that each belongs to."""
        return [(0, shot)]

    @abstractmethod
    def __call__(self, pieces: list[Any]) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, D] and weights [B, T]."""

    def finish(self, features_nKD: Tensor) -> Tensor:
        """What is done to the vectors of shots at the end."""
        return features_nKD

    @abstractmethod
    def sampling(self) -> dict[str, Any]:
        """How a shot is sampled, as JSON."""


class Words(Input):
    """Text, cut off at the longest input of the model.

    Averaged over tokens, a shot's K vectors are those of equal parts of its tokens, each of which has seen the whole
    text. Otherwise, or with a prefix, the text is cut into K parts by its words, and each is encoded on its own.
    """

    def __init__(self, model: Any, tokenizer: Any, sentences: Sentences) -> None:
        super().__init__(model, width=int(model.config.hidden_size))
        self._tokenizer, self._sentences = tokenizer, sentences
        # Padding on the left would move the words of models that count positions from there.
        tokenizer.padding_side = "right"
        self._longest = min(_longest_text(tokenizer, model.config), sentences.longest or _NO_LIMIT)
        self.pooling = sentences.pooling
        self.per_piece = sentences.pooling != "mean" or bool(sentences.prefix)
        self._skipped = 0 if sentences.averages_prefix else _tokens_before(tokenizer, sentences.prefix)

    def pieces(self, shot: str, tokens: int) -> list[tuple[int, Any]]:
        words = shot.split()
        if not self.per_piece or tokens == 1:
            return [(0, self._sentences.prefix + shot)]
        # Neighbours share words where there are fewer than parts.
        bounds = [(k * len(words) // tokens, -(-(k + 1) * len(words) // tokens)) for k in range(tokens)]
        return [(k, self._sentences.prefix + " ".join(words[i:j])) for k, (i, j) in enumerate(bounds)]

    def __call__(self, pieces: list[str]) -> tuple[Tensor, Tensor]:
        inputs = self._tokenizer(
            pieces, padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        ).to(self.model.device)
        mask_BT = inputs["attention_mask"]
        hidden_BTD = self.model(input_ids=inputs["input_ids"], attention_mask=mask_BT).last_hidden_state
        order_BT = mask_BT.cumsum(1) * mask_BT  # 1 for the first token that is no padding
        if self.pooling == "cls":
            mask_BT = order_BT == 1
        elif self.pooling == "last":
            mask_BT = order_BT == order_BT.amax(1, keepdim=True)
        else:
            mask_BT = order_BT > self._skipped
        return hidden_BTD, mask_BT / mask_BT.sum(1, keepdim=True).clamp(min=1) if self.per_piece else mask_BT

    def finish(self, features_nKD: Tensor) -> Tensor:
        return F.normalize(features_nKD, dim=-1) if self._sentences.normalize else features_nKD

    def sampling(self) -> dict[str, Any]:
        told: dict[str, Any] = {"longest": self._longest}
        if self._sentences.normalize:
            told["normalize"] = True
        return {**told, "prefix": self._sentences.prefix} if self._sentences.prefix else told


def pooled(told: Any) -> Tensor:
    """[B, D], whatever a model calls it."""
    if isinstance(told, Tensor):
        return told
    pooled: Tensor | None = getattr(told, "pooler_output", None)
    return told.last_hidden_state[:, 0] if pooled is None else pooled


_NO_LIMIT = 1 << 30


def _longest_text(tokenizer: Any, config: Any) -> int:
    """The longest input of the model in tokens; a tokenizer that was not told says about 1e30."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    # RoBERTa counts positions from the padding token's number on, and has that many fewer to use.
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= config.pad_token_id + 1
    return int(min(tokenizer.model_max_length, positions))


def _tokens_before(tokenizer: Any, prefix: str) -> int:
    """Tokens before the text: those of the prefix and what a text begins with."""
    tokens = tokenizer(prefix)["input_ids"]
    return len(tokens) - (len(tokens) > 0 and tokens[-1] in (tokenizer.sep_token_id, tokenizer.eos_token_id))
