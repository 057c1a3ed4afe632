"""The small model's vocabulary: whole words of the problems, digits, and single characters.

A word keeps the space before it, a number is read digit by digit, and text outside the problems'
words falls apart into characters, so that any ASCII text can be encoded and decoded exactly.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import islice

from .problem import END, shown
from .sets import problems

# How text is cut before the lookup; the tokenizer file uses the same expression.
PATTERN = r" ?<<|>>|####| ?[A-Za-z]+|[0-9]|\n+| ?[^\sA-Za-z0-9]|\s"

PAD, UNKNOWN, EOS = "<pad>", "<unk>", "<eos>"

_CUT = re.compile(PATTERN)
_SAMPLE = 20_000


@cache
def vocabulary() -> dict[str, int]:
    """Token text to id: special tokens, printable ASCII, then the problems' words."""
    characters = ["\n", *map(chr, range(32, 127))]
    pieces = {
        piece for problem in islice(problems(0), _SAMPLE) for piece in _CUT.findall(shown(problem))
    }
    words = sorted(pieces - set(characters))
    return {token: i for i, token in enumerate([PAD, UNKNOWN, EOS, *characters, *words])}


@cache
def end_id() -> int:
    """The token that ends an answer."""
    return vocabulary()[END]


@cache
def _ids(piece: str) -> tuple[int, ...]:
    ids = vocabulary()
    if piece in ids:
        return (ids[piece],)
    return tuple(ids.get(character, ids[UNKNOWN]) for character in piece)


def encode(text: str) -> list[int]:
    """Token ids, as the tokenizer file gives them."""
    return [token for piece in _CUT.findall(text) for token in _ids(piece)]


def decode(ids: list[int]) -> str:
    """Text of the ids; those past the vocabulary (a model's table is padded) are left out."""
    texts = list(vocabulary())
    return "".join(texts[token] for token in ids if token < len(texts))
