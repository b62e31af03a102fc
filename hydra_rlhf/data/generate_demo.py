"""Writes the bundled task: ``python -m hydra_rlhf.data.generate_demo [FOLDER] [--seed N]``.

The same seed gives the same bytes on every machine: only ``Random.random`` is drawn from, whose
sequence Python promises to keep.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from hydra_rlhf.data.demo_grammar import ABOUT, ADDRESS, PROMPTS, THEMES, TONES, WHENS, Theme, fill
from hydra_rlhf.data.gold import gold_reward

SEED = 2309
SIZES = {"train": 4000, "test": 400, "prompts": 400}  # no prompt is in two of them, or twice in one
TEMPERATURE = 0.12  # of the labels, in units of gold: P(chosen) = sigmoid(margin / temperature)
MIN_MARGIN = 0.15  # answers closer than this are not compared

T = TypeVar("T")


def pick(rng: random.Random, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def all_prompts(rng: random.Random) -> list[tuple[str, str]]:
    """Every prompt and its topic, in random order."""
    prompts = [
        (template.replace("{X}", topic).replace("{when}", when), topic)
        for template in PROMPTS
        for theme in THEMES
        for topic in theme.topics
        for when in WHENS
    ]
    return [prompt for _, prompt in sorted((rng.random(), prompt) for prompt in prompts)]


def sentence(rng: random.Random, theme: Theme, topic: str, tone: str) -> str:
    kind = rng.random()
    if kind < 0.55:
        templates = theme.sentences[tone]
    elif kind < 0.8:
        templates = ABOUT[tone]
    else:
        templates = ADDRESS[tone]
    return pick(rng, list(fill(pick(rng, templates), topic)))


def response(rng: random.Random, topic: str) -> str:
    """An answer of mixed quality: any mood, at times astray, cut off, repeating or scrambled."""
    mood = pick(rng, TONES)
    own = next(theme for theme in THEMES if topic in theme.topics)
    astray = rng.random() < 0.3
    other = pick(rng, THEMES)
    elsewhere = pick(rng, other.topics)
    sentences = []
    for _ in range(pick(rng, (1, 2, 2, 2, 3, 3, 4))):
        tone = mood if rng.random() < 0.8 else pick(rng, TONES)
        if astray and rng.random() < 0.8:
            sentences.append(sentence(rng, other, elsewhere, tone))
        else:
            sentences.append(sentence(rng, own, topic, tone))
    defect = rng.random()
    if defect < 0.06:
        sentences.append(sentences[-1])
    words = " ".join(sentences).split(" ")
    if 0.06 <= defect < 0.18 and len(words) > 4:
        words = words[: 3 + int(rng.random() * (len(words) - 4))]  # cut off
    elif 0.18 <= defect < 0.24:
        words = [word for _, word in sorted((rng.random(), word) for word in words)]
    elif 0.24 <= defect < 0.28:
        at = int(rng.random() * len(words))
        words[at:at] = [words[at]] * (3 + int(rng.random() * 6))
    return " " + " ".join(words)


def pair(rng: random.Random, prompt: str, topic: str) -> dict[str, str]:
    """Two answers, labelled by a noisy comparison of their gold rewards (Bradley, Terry 1952)."""
    margin = 0.0
    while abs(margin) < MIN_MARGIN:
        first, second = response(rng, topic), response(rng, topic)
        margin = gold_reward(prompt, first) - gold_reward(prompt, second)
    if rng.random() >= 1.0 / (1.0 + math.exp(-margin / TEMPERATURE)):
        first, second = second, first
    return {"prompt": prompt, "chosen": first, "rejected": second}


def generate(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """The three files' records: pairs to train on, held-out pairs, held-out prompts."""
    rng = random.Random(seed)
    prompts = iter(all_prompts(rng))
    return {
        "train": [pair(rng, *next(prompts)) for _ in range(SIZES["train"])],
        "test": [pair(rng, *next(prompts)) for _ in range(SIZES["test"])],
        "prompts": [{"prompt": next(prompts)[0]} for _ in range(SIZES["prompts"])],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the bundled preference task as JSONL.")
    here = Path(__file__).parent / "bundled"
    parser.add_argument("folder", nargs="?", type=Path, default=here, help=f"default: {here}")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, records in generate(args.seed).items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (args.folder / f"{name}.jsonl").write_bytes(lines.encode())


if __name__ == "__main__":
    main()
