"""The tokenizer of a model directory: loads it, and says why it cannot be loaded.

transformers' errors rarely name the file. So what each file needs is looked at here, in the order
in which transformers takes them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truedepth.errors import TruedepthError
from truedepth.families.lookup import unconverted
from truedepth.progress import note
from truedepth.sources.companions import (
    SETTINGS,
    TOKENIZER,
    VOCABULARIES,
    check_size,
    companions,
)
from truedepth.sources.fetched import check_fetched
from truedepth.sources.limits import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from truedepth.sources.source import Source

BACKEND = "tokenizer.json"

AS_IT_IS = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")
"""Names of the class that takes tokenizer.json as it is; releases before 5 know the first."""

HERE = ("is_local", "local_files_only")
"""What transformers 5 writes of where a tokenizer was loaded from."""

SAMPLES = ("the cat", "Zwölf Boxkämpfer, 日本語", "12345 + 6.7")
"""Texts by which a tokenizer made from SentencePiece's file is compared with SentencePiece."""


def load_tokenizer(
    path: Path, config: Mapping[str, Any], trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    A converted model's is loaded as its original's is.

    Args:
        path: The directory.
        config: The contents of config.json.
        trust_remote_code: Run the tokenizer's own code if it has some.

    Raises:
        TruedepthError: There is none, or a file is missing or broken, or needs a package or code.
    """
    from transformers import AutoTokenizer

    for name in companions(path, TOKENIZER):
        check_fetched(path / name)
        if (path / name).is_file():
            check_size(name, (path / name).stat().st_size, str(path / name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            # Given a config, transformers does not look for one, nor for a config's own code.
            config=_config(path, config),
            trust_remote_code=trust_remote_code,
            # The same tokenizer whether or not mistral-common is installed.
            mistral_format=False,
        )
    except Exception as error:
        if reason := _reason(path, trust_remote_code):
            raise TruedepthError(reason) from error
        raise
    return _like_sentencepiece(path, config, tokenizer)


def _config(path: Path, config: Mapping[str, Any]) -> Any:
    """What decides between tokenizer classes: a config of the original's type, and its entries.

    For some types transformers takes a class of its own whatever tokenizer_config.json says, but
    a file that is to be taken as it is stays so.
    """
    from transformers import AutoConfig, PreTrainedConfig

    said = {key: config[key] for key in ("tokenizer_class", "_name_or_path") if config.get(key)}
    settings = read_json(path / SETTINGS) if (path / SETTINGS).exists() else {}
    if settings.get("tokenizer_class") in AS_IT_IS and (path / BACKEND).exists():
        return PreTrainedConfig(**said)
    try:
        return AutoConfig.for_model(unconverted(str(config.get("model_type"))), **said)
    except Exception:  # a type that transformers does not know
        return PreTrainedConfig(**said)


def _class_in_use(model_type: str, name: str) -> str:
    """The class by which transformers 5 reads an original's tokenizer.json.

    Where it knows that the files of a type name the wrong class, it does not follow them. It does
    not know our types, so theirs must name the right one.
    """
    from transformers.models.auto.tokenization_auto import (
        MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
        TOKENIZER_MAPPING_NAMES,
    )

    own = TOKENIZER_MAPPING_NAMES.get(model_type)
    if name in AS_IT_IS or own in (*AS_IT_IS, "MistralCommonBackend"):
        return AS_IT_IS[0]
    return own if own and model_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS else name


def _reason(path: Path, trust_remote_code: bool) -> str | None:
    """Why the tokenizer of a directory could not be loaded, if one of its files shows it."""
    settings = read_json(path / SETTINGS) if (path / SETTINGS).exists() else {}
    if "auto_map" in settings and not trust_remote_code:
        return (
            f"The tokenizer of {path} needs its own code, which runs only where it is allowed:"
            " truedepth convert, eval, generate, heal, plan and study take --trust-remote-code"
            " (trust_remote_code=True in Python); read that code first."
        )
    found = companions(path, VOCABULARIES)
    if not found:
        return f"{path} has no tokenizer: it has none of {', '.join(VOCABULARIES)}."
    for name in companions(path, TOKENIZER):
        if name.endswith(".json"):
            read_json(path / name)
    if BACKEND in found:
        return _why_not_parsed(path / BACKEND)
    for name in (name for name in found if not name.endswith(".tiktoken")):
        if missing := _missing_package(path / name):
            return (
                f"The tokenizer of {path} is {name}, for which transformers needs the package"
                f" {missing}, which is not installed: pip install {missing}."
            )
    if all(name.endswith(".tiktoken") for name in found):
        return (
            f"The tokenizer of {path} is {found[0]}, which transformers reads only with code of its"
            f" own, and {SETTINGS} names none; add a {BACKEND}."
        )
    if "vocab.json" in found and not (path / "merges.txt").exists():
        return f"{path} has a vocab.json but neither merges.txt nor tokenizer.json."
    if (named := settings.get("tokenizer_class")) and not _is_known(str(named)):
        return (
            f"{path / SETTINGS} names the class {named!r}, which this release of transformers does"
            f" not know, and there is no {BACKEND}."
        )
    return None


def _why_not_parsed(file: Path) -> str | None:
    import tokenizers

    try:
        tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # of no class of its own
        return (
            f"{file} is damaged, or of a newer release than tokenizers {tokenizers.__version__}:"
            f" {error}."
        )
    return None


def _missing_package(vocabulary: Path) -> str | None:
    """The first package that reading a vocabulary file needs and that is not installed."""
    needed = []
    if vocabulary.name == "tekken.json":
        needed = [] if "special_tokens" in read_json(vocabulary) else ["mistral-common"]
    elif _is_tiktoken(vocabulary):
        needed = ["tiktoken"]
    elif vocabulary.suffix == ".model":
        needed = ["sentencepiece", "protobuf"]
    modules = {"mistral-common": "mistral_common", "protobuf": "google.protobuf"}
    return next((name for name in needed if not _installed(modules.get(name, name))), None)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _is_tiktoken(vocabulary: Path) -> bool:
    """Whether a `.model` file is tiktoken's: lines of a token in base64 and its rank."""
    with vocabulary.open("rb") as file:
        words = file.readline(1 << 10).split()
    return len(words) == 2 and words[1].isdigit()


def _is_known(name: str) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return tokenizer_class_from_name(name) is not None


def _like_sentencepiece(
    path: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """A tokenizer made from SentencePiece's file alone, after it is compared with SentencePiece.

    Where no class is named, transformers takes one that does not put a space before a text; that
    of Llama may be right then.
    """
    found = companions(path, VOCABULARIES)
    files = [path / name for name in found if name.endswith(".model")]
    if len(files) != len(found) or _is_tiktoken(files[0]) or not _installed("sentencepiece"):
        return tokenizer
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer

    try:
        processor = SentencePieceProcessor(model_file=str(files[0]))
    except RuntimeError:  # a file of another kind, from which the tokenizer was not made
        return tokenizer

    def is_right(candidate: PreTrainedTokenizerBase) -> bool:
        return all(
            candidate(text, add_special_tokens=False)["input_ids"] == processor.encode(text)
            for text in SAMPLES
        )

    if is_right(tokenizer):
        return tokenizer
    settings = read_json(path / SETTINGS) if (path / SETTINGS).exists() else {}
    if not (settings.get("tokenizer_class") or config.get("tokenizer_class")):
        other: PreTrainedTokenizerBase = LlamaTokenizer.from_pretrained(path)
        if is_right(other):
            return other
    raise TruedepthError(
        f"transformers ({type(tokenizer).__name__}) splits text otherwise than {files[0]} does;"
        f" name the right tokenizer_class in {SETTINGS}, or add a {BACKEND}."
    )


def complete_tokenizer(source: Source, out: Path) -> None:
    """Make a tokenizer that was saved to `out` load wherever transformers does.

    The class is then named in tokenizer_config.json, by a name that all releases know, and what
    can be in tokenizer.json is there, so that neither config.json nor other packages are needed.

    Args:
        source: The model that the tokenizer is of.
        out: The directory that it was saved to.
    """
    if not companions(out, VOCABULARIES):
        return
    settings = read_json(out / SETTINGS) if (out / SETTINGS).exists() else {}
    if "auto_map" in settings:
        note(
            f"The tokenizer of {source.name} has its own code, which goes along as it is; programs"
            " ask before they run it."
        )
        return
    before = dict(settings)
    if not (out / BACKEND).exists() or not settings.get("tokenizer_class"):
        saved = _saved_again(source, out)
        settings = settings or saved
        if named := settings.get("tokenizer_class") or saved.get("tokenizer_class"):
            settings["tokenizer_class"] = named
    if (out / BACKEND).exists():
        model_type = unconverted(str(source.config.get("model_type")))
        name = str(settings.get("tokenizer_class") or AS_IT_IS[0])
        settings["tokenizer_class"] = _class_in_use(model_type, name)
    if isinstance(settings.get("extra_special_tokens"), list):  # releases before 5 take a dict
        more = settings.pop("extra_special_tokens")
        settings |= {"additional_special_tokens": more} if more else {}
    if settings != before:
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (out / SETTINGS).write_text(text, encoding="utf-8")


def _saved_again(source: Source, out: Path) -> dict[str, Any]:
    """Save what `out` lacks as transformers saves it; gives its tokenizer_config.json."""
    try:
        tokenizer = source.tokenizer
    except TruedepthError as error:
        note(f"The tokenizer goes along as it is, but it cannot be loaded here. {error}")
        return {}
    with tempfile.TemporaryDirectory() as directory:
        saved = Path(directory)
        tokenizer.save_pretrained(saved)
        if (saved / BACKEND).exists() and not (out / BACKEND).exists():
            shutil.copyfile(saved / BACKEND, out / BACKEND)
        settings = read_json(saved / SETTINGS) if (saved / SETTINGS).exists() else {}
        return {key: settings[key] for key in settings if key not in HERE}
