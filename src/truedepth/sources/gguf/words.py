r"""How byte-level BPE splits text into words, by llama.cpp's names (`tokenizer.ggml.pre`).

For a GGUF file the truth is what llama.cpp does (src/llama-vocab.cpp and src/unicode.cpp, as built
into llama-cpp-python 0.3.36), also where the published tokenizer does something else:

- `'s` and the like: the published patterns say `(?i:…)`, which also takes the long s.
- `tekken`, `gpt-4o`: an accented capital may end a word; combining marks are no letters.
- `deepseek-llm`, `deepseek-coder`: white space beyond ASCII is in no class but `\s`.
- `tiny_aya`, `afmoe`: a text before digits is not cut from the first one to three of them.
- `kimi-k2`: combining marks are no letters.

The patterns here are Oniguruma's, which `tokenizers` uses, and give the same words. The exception
are the characters that Unicode 15.1 and 16 added: llama.cpp takes them for symbols.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """How text is split into words before BPE merges are applied."""

    patterns: tuple[str, ...]
    """Regular expressions, applied in order to the pieces that those before have left."""

    whole: bool = False
    """Whether a word that is a token is taken whole, without merging (`ignore_merges`)."""

    begins: bool = False
    """Whether texts begin with BOS where the file does not say (`add_bos_token`)."""


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_PUBLISHED_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SHORT = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _modern(digits: str, word: str = _WORD, signs: str = _SIGNS, space: str = _SPACE) -> str:
    return f"{_SHORT}|{word}|{digits}|{signs}|{space}"


def _cased(letter: str, more: str, digits: str) -> str:
    """Words of capitals and then others; only the letters of ASCII count as small or capital."""
    no_small, no_capital = rf"(?:(?![a-z]){letter})", rf"(?:(?![A-Z]){letter})"
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{no_small}*{no_capital}+{more}|"
        rf"[^\r\n\p{{L}}\p{{N}}]?{no_small}+{no_capital}*{more}|"
        rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"
    )


_LLAMA3 = _modern(r"\p{N}{1,3}")
_QWEN2 = _modern(r"\p{N}")
_ACCENTED = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+(?:{_SHORT})?"
_TINY_AYA = rf"{_ACCENTED}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"
_YOUTU = rf"{_ACCENTED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"

# Digits in threes, counted from their end; what is before them goes with the first of them.
_THREES = r"(?>\P{N}+)\z|\P{N}*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"

_KANJI_KANA = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
_PUNCTUATED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)
_DEEPSEEK3 = (r"\p{N}{1,3}", _KANJI_KANA, rf"{_PUNCTUATED}[\r\n]*|{_SPACE}")
_DEEPSEEK_HAN = r"(?:(?!\s)[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}])+"
_DEEPSEEK_SIGNS = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}\x{3002}]+"
_DEEPSEEK_LETTERS = (
    r"\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}"
    r"\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}"
    r"\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}"
    r"\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}"
    r"\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}"
    r"\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}"
    r"\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}"
    r"\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}"
    r"\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}"
    r"\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}"
    r"\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}"
    r"\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}"
    r"\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}"
    r"\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}"
    r"\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}]+"
)

_HAN = (
    r"[\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2EBEF}"
    r"\x{2F800}-\x{2FA1F}]"
)
_KIMI = (
    rf"{_HAN}+|[^\r\n\p{{L}}\p{{N}}]?(?:(?!{_HAN})\p{{L}})+(?:{_SHORT})?|\p{{N}}{{1,3}}|"
    rf"{_SIGNS}|{_SPACE}"
)
_ASIAN = (
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{8C48}-\x{FAFF}\x{3040}-\x{309F}\x{30A0}-\x{30FF}"
    r"\x{FF65}-\x{FF9F}\x{2F00}-\x{2FDF}\x{E40}-\x{E7F}\x{E80}-\x{EFF}\x{1780}-\x{17FF}"
    r"\x{1000}-\x{109F}\x{AA60}-\x{AA7F}\x{A9E0}-\x{A9FF}\x{AC00}-\x{D7AF}\x{1100}-\x{11FF}]+"
)
_YOUTU_SCRIPTS = (
    r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+|[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}\x{2019}\x{2014}"
    r"\x{FF1A}\x{FF1B}\x{FF0C}\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+|[\x{3105}-\x{312F}]+|"
    + _KANJI_KANA
)
_RUNS = "|".join(rf"\s{{{2**power}}}(?!\S)" for power in range(9, 1, -1))
_BLOOM = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+"
_THREE_DIGITS = "[0-9][0-9][0-9]"

_ONE_DIGIT_GPT2 = Words((r"\p{N}", GPT2))
_LLAMA_3 = Words((_LLAMA3,), whole=True, begins=True)


def _names(words: Words, names: str) -> dict[str, Words]:
    return dict.fromkeys(names.split(), words)


WORDS: dict[str, Words] = {
    **_names(Words((GPT2,)), "gpt-2 mpt olmo jais trillion granite-docling exaone4 phi-2 gigachat"),
    **_names(Words((GPT2,)), "a.x-4.0 mellum modern-bert jina-es jina-de jina-v1-en roberta-bpe"),
    **_names(_ONE_DIGIT_GPT2, "smollm starcoder refact command-r codeshell exaone minerva-7b"),
    **_names(_ONE_DIGIT_GPT2, "mellum2"),
    **_names(_LLAMA_3, "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2"),
    **_names(_LLAMA_3, "jina-v5-nano"),
    **_names(Words((_LLAMA3,)), "dbrx smaug-bpe chatglm-bpe"),
    **_names(Words((_LLAMA3,), whole=True), "glm4 glm5"),
    **_names(Words((_QWEN2,)), "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan"),
    **_names(Words((_QWEN2,)), "solar-open grok-2 bailingmoe bailingmoe2 llada-moe"),
    "tekken": Words((_cased(r"\p{L}", "", r"\p{N}"),), whole=True, begins=True),
    **_names(
        Words((_cased(r"\p{L}", f"(?:{_SHORT})?", r"\p{N}{1,3}"),)),
        "gpt-4o llama4 kanana2 talkie minimax-m2",
    ),
    "granite-embed-multi-97m": Words(
        (_cased(r"[\p{L}\p{M}]", f"(?:{_SHORT})?", r"\p{N}{1,3}"),), whole=True
    ),
    "default": Words((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", _THREE_DIGITS)),
    "falcon": Words((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, _THREE_DIGITS)),
    "deepseek-llm": Words(
        (
            *(r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_SIGNS, r"\s+\z"),
            *(_DEEPSEEK_HAN, r"\p{N}+"),
        )
    ),
    "deepseek-coder": Words((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, r"\p{N}")),
    **_names(Words(_DEEPSEEK3), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    "spark2_5": Words(
        (*_DEEPSEEK3[:2], rf"{_PUNCTUATED}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"),
    ),
    "afmoe": Words((_THREES, _ASIAN, _DEEPSEEK3[2])),
    **_names(Words((_THREES, _TINY_AYA)), "tiny_aya cohere2moe"),
    "youtu": Words((_YOUTU_SCRIPTS, _YOUTU), whole=True),
    "qwen35": Words(
        (
            _modern(
                r"\p{N}",
                word=r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                signs=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
            ),
        )
    ),
    "jais-2": Words(
        (_modern(r"\p{N}{1,3}", space=rf"\s*[\r\n]+|{_RUNS}|\s{{1,2}}(?!\S)|\s{{1}}"),)
    ),
    "seed-coder": Words((_modern(r"\p{N}", signs=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    "ufakzeka": Words((rf"{_WORD}|\p{{N}}|{_SIGNS}|{_SPACE}",)),
    "laguna": Words((r"[^\n]+|[\n]+", _QWEN2)),
    "exaone-moe": Words(
        (
            _modern(
                r"\p{N}",
                word=r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                signs=r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
            ),
        )
    ),
    "minicpm5": Words((r"\p{N}{1,3}", _modern(r"\p{N}+")), whole=True),
    "kimi-k2": Words((_KIMI,)),
    "superbpe": Words((r"\p{N}+", r"(?=([0-9]{3})+(?![0-9]))")),
    **_names(Words((_BLOOM,)), "bloom gpt3-finnish poro-chat"),
    "viking": Words((_BLOOM, r"\p{N}")),
    "chameleon": Words(
        (
            *("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )"),
            *(r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", GPT2),
        ),
        begins=True,
    ),
}
"""Ways of splitting that give llama.cpp's words, by name; a canonical name comes first."""

REFUSED = {
    "gemma4": "it merges characters, not bytes",
    "granite-embed-multi-311m": "it merges characters, not bytes",
    "sarvam-moe": "it merges characters, not bytes",
    "whitespace": "its tokens are whole words, not bytes",
    "jina-v2-es": "its mask token takes the white space before it",
    "jina-v2-de": "its mask token takes the white space before it",
    "jina-v2-code": "its mask token takes the white space before it",
}
"""Names that llama.cpp knows and that are not read, and why."""

_PUBLISHED_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def published(name: str) -> tuple[str, ...]:
    """The patterns of a published tokenizer.json for which llama.cpp has a name."""
    if name == "tekken":
        return (_PUBLISHED_TEKKEN,)
    return tuple(pattern.replace(_SHORT, _PUBLISHED_SHORT) for pattern in WORDS[name].patterns)


def canonical() -> list[str]:
    """One name for every way of splitting."""
    found = {(words.patterns, words.whole): name for name, words in reversed(WORDS.items())}
    return [*found.values()][::-1]


def name_of(patterns: tuple[str, ...], whole: bool) -> str | None:
    """llama.cpp's name for a way of splitting, published or as it is read here, or None."""
    for name, words in WORDS.items():
        if words.whole == whole and patterns in (words.patterns, published(name)):
            return name
    return None
