"""What of a model's generation_config.json its calls follow.

transformers merges that file into every call of `generate`, also into calls with a config of their
own. Here a call follows the settings named below, and the model's own config is out of the way
while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from truedepth.errors import TruedepthError, reason_of
from truedepth.sources.source import Source

FOLLOWED = (
    *("min_length", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"),
)
"""Settings that an answer follows, besides end tokens and stop strings."""

SAMPLING = ("top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
"""Settings that an answer follows if it is sampled."""

FRACTIONS = {"repetition_penalty", *SAMPLING} - {"top_k"}
"""Settings that transformers takes as `1.0` only, where files also say `1`."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "cache_implementation": ("dynamic", "hybrid"),  # transformers reads the latter as the former
}
"""Values at which nothing is lost by not following, besides None, False, 0 and what is empty."""

SILENT = (
    *("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "stop_strings"),
    *("do_sample", "temperature", "max_length", "max_new_tokens"),  # the caller says these
    *("early_stopping", "length_penalty", "diversity_penalty"),  # of beams
    *("cache_config", "max_cache_len", "is_assistant", "num_assistant_tokens"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind"),
    *("target_lookbehind", "max_matching_ngram_size", "renormalize_logits", "compile_config"),
    *("disable_compile", "continuous_batching_config", "transformers_version"),
)
"""Settings that are not followed without a word: they change no text, or others say their part."""


_ONLY_GENERATION = vars(GenerationConfig()).keys() - {
    *("eos_token_id", "bos_token_id", "pad_token_id", "use_cache", "transformers_version"),
    *("output_attentions", "output_hidden_states"),
}


@dataclass(frozen=True)
class Followed:
    """What an answer follows of a model's generation config, and what it does not."""

    settings: dict[str, Any]
    """Arguments of `GenerationConfig`."""

    stop_strings: tuple[str, ...]
    ignored: dict[str, Any]


def as_written(settings: Mapping[str, Any]) -> GenerationConfig:
    """A generation config with a file's values, none of which is checked.

    transformers would refuse to load a model for values that only `generate` reads.
    """
    config = GenerationConfig()
    for name in vars(config).keys() & settings.keys():
        setattr(config, name, settings[name])
    return config


def without_generation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without settings of `generate`, which old ones hold.

    transformers checks them whenever it builds a model, and refuses some.
    """
    return {key: value for key, value in config.items() if key not in _ONLY_GENERATION}


def followed(config: GenerationConfig, source: Source, sampled: bool) -> Followed:
    """What an answer follows of a model's generation config.

    Args:
        config: The model's own config. If it names no end token, the tokenizer's is used.
        source: The model.
        sampled: Whether tokens are sampled; else sampling settings are passed over.

    Raises:
        TruedepthError: An end token is not an id, or a stop string not a string.
    """
    end = end_tokens(config, source)
    if not end and config.eos_token_id not in (None, []):
        raise TruedepthError(
            f"The generation config of {source.name} gives {config.eos_token_id!r} as eos_token_id,"
            " which must be the id of a token, or a list of ids."
        )
    settings: dict[str, Any] = {"eos_token_id": end or None}
    for name in (*FOLLOWED, *(SAMPLING if sampled else ())):
        if (value := getattr(config, name, None)) is not None:
            settings[name] = _as_number(name, value)
    strings = config.stop_strings or ()
    strings = (strings,) if isinstance(strings, str) else strings
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) for s in strings):
        raise TruedepthError(
            f"The generation config of {source.name} gives {strings!r} as stop_strings, which must"
            " be a list of strings."
        )
    ignored = {
        name: value
        for name, value in sorted(vars(config).items())
        if not name.startswith("_")
        and name not in (*FOLLOWED, *SAMPLING, *SILENT)
        and _changes(name, value)
    }
    return Followed(settings, tuple(filter(None, strings)), ignored)


def end_tokens(config: GenerationConfig, source: Source) -> list[int]:
    """The ids of a config's end tokens, or the tokenizer's if it names none.

    What is not an id is left out.
    """
    end = source.tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    given = end if isinstance(end, list) else [end]
    return [int(token) for token in given if isinstance(token, int | float) and token == int(token)]


def _as_number(name: str, value: Any) -> Any:
    if name in FRACTIONS and type(value) is int:
        return float(value)
    if name == "top_k" and value == -1:  # as other engines write that there is no limit
        return 0
    if name == "top_k" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _changes(name: str, value: Any) -> bool:
    if name == "use_cache":
        return value is False
    return bool(value) and value not in NEUTRAL.get(name, ())


def checked_config(source: Source, **settings: Any) -> GenerationConfig:
    """A generation config for one call.

    Raises:
        TruedepthError: transformers refuses a value, which comes from the model's own config.
    """
    try:
        return GenerationConfig(**settings)
    except Exception as error:  # a file may hold values of every type
        raise TruedepthError(
            f"The generation config of {source.name} cannot be followed:"
            f" {reason_of(error).removesuffix('.')}; correct its generation_config.json."
        ) from error


@contextmanager
def replaced(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put a config in the place of the model's own, from which transformers would merge."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
