"""Texts on which tokenizers disagree: many scripts, white space, numbers, emoji, code."""

# ruff: noqa: RUF001, SIM905

from __future__ import annotations

import random
import unicodedata

WORDS = (
    "the cat sat on a mat and then I'll don't we've they're it's she'd I'M CAN'T WE'LL it’s don’T"
    " naïve café Ünïcode ÉCOLE École straße İstanbul ŞİİR ǅungla camelCase XMLHttpRequest HTTP2Go"
    " Привет мир ПРИВЕТ Ελληνικά ΑΘΗΝΑ שלום עולם مرحبا بالعالم हिन्दी नमस्ते বাংলা தமிழ் ไทยภาษา"
    " 한국어 안녕하세요 日本語 東京タワー ひらがな カタカナ ｶﾀｶﾅ 中文 你好世界 龘靐 𠀀𠀁 "
    " ქართული հայերեն አማርኛ ខ្មែរ မြန်မာ ລາວ བོད་སྐད ᏣᎳᎩ ᚠᚢᚦ ⠓⠑⠇ 𐐀𐐨 ẞ ﬁne"
    " Ａｂｃ １２３ e\u0301le\u0300ve o\u0302\u0301"
    " q\u0307\u0323 a\u0308\u0308\u0308 \u0301x n\u0303"
).split()
NUMBERS = (
    "0 7 42 123 1234 12345 123456 1234567 12345678901234567890 3.14 1,000,000 1e-9 0x1F 2024-05-17"
    " ١٢٣ ١٢٣٤٥ १२३४ ๑๒๓ 〇一二 ½ ¾ ² x² ⅧⅨ ①②③④ Ⅻ １２３４ 12٣4 𝟙𝟚𝟛 1a2b 100% $5 €7.50 -12 +3 1/2"
).split()
SIGNS = (
    "! ? ... … -- — « » “q” ‘q’ ' '' 's 'S 'll 'LL 're'Ve 't' 'd 'ſ ’s (a) [b] {c} <d> <= >= == !="
    " ++ -> => :: ;; @@ ## $$ %% ^^ && ** __ ~~ `` || \\ \\n / // /// .. ., ,. ?!"
    " 。，、！？：；「」『』【】〜 ・ ¿¡ § ¶ † ‰ № ™ © ® ° ± × ÷ √ ∞ ≈ ≠ → ⇒ ■ ★ ☃ ♥ ¤"
    " ﹏ ︰ ·́ ˈ ʼ ʰ"
).split()
EMOJI = ("🙂 😀😃 👍🏽 👩‍💻 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ ☀️ 1️⃣ 🤷🏾‍♀️ 🦄🚀 ✨ 🫠 🧑🏿‍🚒").split()
SPACES = (
    *("\t", "\n", "\r\n", "\r", "\u00a0", "\u3000", "\u2003", "\u2028", "\u0085", "\u200b", "\v"),
    *("\u1680", "\u202f", "\ufeff", "\f", "\x1c", "\u200d", "\u2009"),
)
CODE = (
    *(
        "def f(x):\n    return x ** 2  # done\n",
        "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i];\n}\n",
    ),
    *(
        "if (a && b || !c) { return; }",
        '<div class="x">&nbsp;</div>\r\n',
        "SELECT * FROM t WHERE a='b';",
    ),
    *("\\frac{1}{2} \\alpha_i^2", "https://example.org/a?b=c&d=%20#e", "x=1;y=2\n\n\n\tz = x+y\n"),
    *(
        '{"key": [1, 2.5e3, null]}\n',
        "/usr/local/bin/../lib//x.so",
        "a_b__c-d--e.f..g",
        "\n \n  \n\t\n",
    ),
)
RANGES = (
    *((0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80)),
    *((0xE80, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2400), (0x2500, 0x2800), (0x3000, 0x3200)),
    *((0x3400, 0xA000), (0xAC00, 0xD7A4), (0xF900, 0xFB00), (0xFB00, 0xFE00), (0xFF00, 0xFFF0)),
    *((0x10300, 0x10350), (0x1D100, 0x1D800), (0x20000, 0x2A6D7), (0x1F300, 0x1F650), (0, 0x20)),
)
"""Code points; of most of these, those that Unicode 3.2 knew, as any Python and any engine does."""


def texts(special: tuple[str, ...] = (), count: int = 2200) -> list[str]:
    """`count` different texts, the same in every run.

    Args:
        special: Special tokens, some of which are put into texts.
        count: Number of texts.
    """
    choose = random.Random(20)
    pools = (WORDS, WORDS, WORDS, NUMBERS, SIGNS, EMOJI, SPACES, CODE)
    found = dict.fromkeys([*WORDS, *NUMBERS, *SIGNS, *EMOJI, *SPACES, *CODE, " ", "  ", "▁", "a▁b"])
    while len(found) < count:
        parts = []
        for _ in range(choose.randint(1, 9)):
            kind = choose.random()
            if kind < 0.62:
                parts.append(choose.choice(choose.choice(pools)))
            elif kind < 0.72:
                parts.append(choose.choice(SPACES + (" ",) * 6) * choose.randint(1, 6))
            elif kind < 0.78:
                parts.append("".join(choose.choices("0123456789", k=choose.randint(1, 12))))
            elif kind < 0.84:
                parts.append("".join(choose.choices("abAB '.,-\n\t1é", k=choose.randint(1, 10))))
            elif kind < 0.92 or not special:
                parts.append("".join(_character(choose) for _ in range(choose.randint(1, 4))))
            else:
                parts.append(choose.choice(special))
            parts.append(choose.choice(("", "", " ", " ", " ", "\n", "  ")))
        found["".join(parts)] = None
    return list(found)


def _character(choose: random.Random) -> str:
    while True:
        first, end = choose.choice(RANGES)
        character = chr(choose.randrange(first, end))
        if first == 0x1F300 or unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs"):
            return character
