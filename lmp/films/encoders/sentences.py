"""How a text becomes one vector: by options, or as a folder of sentence-transformers says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmp.errors import UserError
from lmp.films.encoders import saved

POOLINGS = ("mean", "cls", "last")
_NAMES = {  # in sentence-transformers
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "mean": "mean",
    "cls": "cls",
    "lasttoken": "last",
}


@dataclass(frozen=True)
class Sentences:
    """One vector for a text.

    Attributes:
        pooling: mean over the tokens; cls, the first token; last, the last one.
        normalize: whether the vector is brought to length 1.
        prefix: put before every text.
        averages_prefix: whether the mean goes over the prefix too.
        longest: tokens of a text at most; None leaves it to the model.
    """

    pooling: str = "mean"
    normalize: bool = False
    prefix: str = ""
    averages_prefix: bool = True
    longest: int | None = None


def read_sentences(
    source: str,
    *,
    pooling: str | None = None,
    normalize: bool | None = None,
    prompt: str | None = None,
    prefix: str | None = None,
) -> Sentences:
    """The settings that sentence-transformers saved with a model, if it did, under these options.

    Args:
        source: folder or hub name.
        pooling, normalize, prefix: instead of what was saved; without either, the plain mean over the tokens.
        prompt: the name of a prompt that was saved; None takes the one that is the default there.

    Raises:
        UserError: pooling, modules or prompts that are not known.
    """
    held = saved.read_json(source, "modules.json") or []
    modules = {str(module["type"]).rsplit(".", 1)[-1]: str(module.get("path", "")) for module in held}
    settings = (saved.read_json(source, f"{modules['Pooling']}/config.json") or {}) if "Pooling" in modules else {}
    if pooling is None:
        if others := [name for name in modules if name not in ("Transformer", "Pooling", "Normalize")]:
            raise UserError(
                f"{source} ends in {others[0]}, which is not done here",
                remedy=f"take the model's own tokens: add ,pooling= with {', '.join(POOLINGS)}",
            )
        pooling = _pooling_of(source, settings) if settings else "mean"
    longest = (saved.read_json(source, "sentence_bert_config.json") or {}).get("max_seq_length") if modules else None
    return Sentences(
        pooling=pooling,
        normalize="Normalize" in modules if normalize is None else normalize,
        prefix=_prefix_of(source, prompt) if prefix is None else prefix,
        averages_prefix=bool(settings.get("include_prompt", True)),
        longest=longest,
    )


def _pooling_of(source: str, settings: dict[str, Any]) -> str:
    named = settings.get("pooling_mode")
    asked = [named] if isinstance(named, str) else [name for name in settings if settings[name] is True]
    modes = [name for name in asked if name != "include_prompt"]
    if len(modes) != 1 or modes[0] not in _NAMES:
        raise UserError(
            f"{source} pools by {' and '.join(modes) or 'nothing'}, which is not done here",
            remedy=f"add ,pooling= with {', '.join(POOLINGS)}",
        )
    return _NAMES[modes[0]]


def _prefix_of(source: str, prompt: str | None) -> str:
    settings = saved.read_json(source, "config_sentence_transformers.json") or {}
    prompts: dict[str, str] = settings.get("prompts") or {}
    name = settings.get("default_prompt_name") if prompt is None else prompt
    if name is None:
        return ""
    if name not in prompts:
        raise UserError(
            f"{source} has no prompt {name!r}", remedy=f"it has {', '.join(prompts) or 'none'}; or write ,prefix=TEXT"
        )
    return prompts[name]
