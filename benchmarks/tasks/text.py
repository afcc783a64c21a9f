"""Real text that needs no network: the reference that Python itself carries.

The topics of `help()` in `pydoc_data.topics`, 465,000 characters of the language
reference in English, by the Python Software Foundation under the PSF licence, version
2. They differ a little between Python's versions: results name the version and the
text's checksum.
"""

import hashlib
import string
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

# What is none of these is the last one.
ALPHABET = string.ascii_letters + string.digits + string.punctuation + " \n?"

_BLOCKS = 20


class Parts(NamedTuple):
    """The text in three parts, as places in the alphabet.

    Attributes:
      train: uint8[n].
      validation: uint8[m].
      test: uint8[m].
      checksum: the first digits of the text's SHA-256.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    checksum: str


def load() -> Parts:
    """Loads the text; of twenty blocks, two are for validation and two for the test."""
    content = "\n".join(topics[name] for name in sorted(topics))
    places = {character: place for place, character in enumerate(ALPHABET[:-1])}
    other = len(ALPHABET) - 1
    encoded = np.array([places.get(c, other) for c in content], np.uint8)
    blocks = np.array_split(encoded, _BLOCKS)
    held_out = {4: "test", 9: "validation", 14: "test", 19: "validation"}

    def part(name: str) -> np.ndarray:
        chosen = [b for i, b in enumerate(blocks) if held_out.get(i, "train") == name]
        return np.concatenate(chosen)

    checksum = hashlib.sha256(content.encode()).hexdigest()[:16]
    return Parts(part("train"), part("validation"), part("test"), checksum)
