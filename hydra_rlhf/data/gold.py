"""The gold reward of the bundled task: what its labels come from, and never shown to training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hydra_rlhf.data.demo_grammar import (
    COLD_WORDS,
    THEME_OF_TOPIC,
    THEMES,
    WARM_WORDS,
    Theme,
    known_trigrams,
    sentences_of,
    trigrams,
    words_of,
)

TONE_OF_SENTENCE = {"warm": 1.0, "plain": 0.4, "cold": 0.0}
LENGTHS = (2, 10, 20, 32)  # words: worth nothing, in full from, in full to, worth nothing
COPIED_RUN = 4  # so many words in a row that the prompt has too are the prompt's


@dataclass(frozen=True)
class GoldTerms:
    """The terms of the gold reward, each in [0, 1]; ``total`` puts them together."""

    fluency: float  # share of trigrams that occur in the grammar: 1 at all of them, 0 at half
    variety: float  # share of trigrams that are not repeats: 1 from 85% on, squared below
    own: float  # share of words that are not copied from the prompt
    relevance: float  # half for naming the topic, half for two words of its theme
    tone: float  # mean over sentences: warm 1, plain 0.4, cold 0
    length: float  # 1 from 10 to 20 words, falling to 0 at 2 and at 32
    ending: float  # 1 if the last sentence is closed

    @property
    def total(self) -> float:
        good = 0.2 * self.relevance + 0.5 * self.relevance * self.tone
        return self.fluency * self.variety * self.own * (
            good + 0.15 * self.length + 0.15 * self.ending
        )  # fmt: skip


def gold_reward(prompt: str, response: str) -> float:
    """How good an answer of the bundled task is, in [0, 1].

    ``fluency * variety * own
    * (0.2 * relevance + 0.5 * relevance * tone + 0.15 * length + 0.15 * ending)``

    with the terms of :class:`GoldTerms`. Kindness counts only as far as the answer is about what
    was asked, and nothing counts in word salad, in repetition, or in a copy of the prompt. Counts
    of words saturate, so more of the same is never better.

    Args:
        prompt: a prompt of the task. One that names no topic of it makes relevance 0.
        response: the answer's text, without special tokens. Space around it does not matter.
    """
    return gold_terms(prompt, response).total


def gold_terms(prompt: str, response: str) -> GoldTerms:
    """The terms of :func:`gold_reward` one by one."""
    sentences = sentences_of(response)
    if not any(_is_word(word) for sentence in sentences for word in sentence):
        return GoldTerms(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    return GoldTerms(
        fluency=_fluency(sentences),
        variety=_variety(words_of(response)),
        own=_own(words_of(prompt), words_of(response)),
        relevance=_relevance(words_of(prompt), sentences),
        tone=sum(TONE_OF_SENTENCE[tone_of(s)] for s in sentences) / len(sentences),
        length=_length(sum(_is_word(word) for word in words_of(response))),
        ending=float(sentences[-1][-1] in ".!?" and len(sentences[-1]) > 3),
    )


def tone_of(sentence: Sequence[str]) -> str:
    """warm, plain or cold, by the words of a sentence; one cold word is enough for cold."""
    words = {word.lower() for word in sentence}
    if words & COLD_WORDS:
        return "cold"
    return "warm" if words & WARM_WORDS else "plain"


def themes_of(sentence: Sequence[str]) -> set[str]:
    """Names of the themes that the words of a sentence belong to."""
    words = {word.lower() for word in sentence}
    return {theme.name for theme in THEMES if words & theme.words or words & {*theme.topics}}


def _is_word(word: str) -> bool:
    return word[0].isalnum()


def _fluency(sentences: list[list[str]]) -> float:
    runs = [run for sentence in sentences for run in trigrams(sentence)]
    share = sum(run in known_trigrams() for run in runs) / len(runs)
    return max(0.0, 2.0 * share - 1.0)


def _variety(words: list[str]) -> float:
    runs = list(zip(words, words[1:], words[2:], strict=False))
    if not runs:
        return 1.0
    return min(1.0, len(set(runs)) / len(runs) / 0.85) ** 2


def _own(prompt: list[str], response: list[str]) -> float:
    def starts(words: list[str]) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + COPIED_RUN]) for i in range(len(words) - COPIED_RUN + 1)]

    theirs = set(starts(prompt))
    copied: set[int] = set()
    for i, run in enumerate(starts(response)):
        if run in theirs:
            copied.update(range(i, i + COPIED_RUN))
    return 1.0 - len(copied) / len(response)


def _relevance(prompt: list[str], sentences: list[list[str]]) -> float:
    topics = [word.lower() for word in prompt if word.lower() in THEME_OF_TOPIC]
    if not topics:
        return 0.0
    theme: Theme = THEME_OF_TOPIC[topics[0]]
    words = {word.lower() for sentence in sentences for word in sentence}
    named = 0.5 * (topics[0] in words) + 0.25 * min(2, len(words & theme.words))
    foreign = sum(bool(themes_of(sentence) - {theme.name}) for sentence in sentences)
    return named * (1.0 - foreign / len(sentences))


def _length(words: int) -> float:
    none, low, high, too_many = LENGTHS
    return max(0.0, min(1.0, (words - none) / (low - none), (too_many - words) / (too_many - high)))
