"""The report's sentences: words/en.toml and words/zh.toml, filled with facts by str.format.

What is filled in is escaped later, with the rest of the sentence, by the template.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

LANGUAGES = ("en", "zh")


@functools.cache
def _table(language: str) -> dict[str, Any]:
    import tomlkit

    file = resources.files("sparse_mla.bump").joinpath(f"words/{language}.toml")
    table: dict[str, Any] = tomlkit.parse(file.read_text(encoding="utf-8")).unwrap()
    return table


class Words:
    """Sentences of one language."""

    def __init__(self, language: str) -> None:
        if language not in LANGUAGES:
            raise ValueError(f"language is {language!r}, allowed: {', '.join(LANGUAGES)}")
        self.language = language
        self.table = _table(language)

    def __call__(self, key: str, **facts: Any) -> str:
        """The sentence with its facts: lists joined, floats short, statuses and sides in words."""
        text: str = self.table[key]
        return text.format(**{name: self._put(name, value) for name, value in facts.items()})

    def lines(self, key: str) -> tuple[str, ...]:
        return tuple(self.table[key])

    def _put(self, name: str, value: Any) -> Any:
        if name == "word":
            return self.table[value]
        if name == "side":
            return self.table[f"side_{value}"]
        if isinstance(value, (list, tuple)):
            return ("、" if self.language == "zh" else ", ").join(str(v) for v in value)
        if isinstance(value, float):
            return f"{value:.3g}"
        return value

    @property
    def comma(self) -> str:
        return "；" if self.language == "zh" else "; "

    @property
    def colon(self) -> str:
        return "：" if self.language == "zh" else ": "

    def sentence(self, text: str) -> str:
        return text + ("。" if self.language == "zh" else ".")

    def fault(self, name: str, about: str) -> str:
        """A fault with what it does; `about` is the library's own English sentence."""
        told = self.table.get("fault_about", {}).get(name, about)
        return f"{name}（{told}）" if self.language == "zh" else f"{name} ({told})"
