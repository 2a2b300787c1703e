"""Random texts in many scripts."""

import unicodedata

import numpy as np

SCRIPT_STARTS = (
    *(0x41, 0xC0, 0x100, 0x370, 0x410, 0x531, 0x5D0, 0x620, 0x710, 0x780, 0x905, 0x985, 0xA05),
    *(0xA85, 0xB05, 0xB85, 0xC05, 0xC85, 0xD05, 0xD85, 0xE01, 0xE81, 0xF40, 0x1000, 0x10D0),
    *(0x1200, 0x13A0, 0x1780, 0x1820, 0x2C00, 0x3041, 0x30A1, 0x4E00, 0xAC00, 0x1F600),
)
"""First letters of 34 scripts, and of the emoji."""


def random_text(rng: np.random.Generator, num_words: int) -> str:
    start = rng.choice(SCRIPT_STARTS)
    letters = [chr(start + i) for i in range(26) if unicodedata.category(chr(start + i)) != "Cn"]
    return " ".join("".join(rng.choice(letters, rng.integers(1, 8))) for _ in range(num_words))
