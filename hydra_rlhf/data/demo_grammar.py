"""The sentences that the bundled task is made of: eight themes, three tones, and their words.

``{X}`` stands for the topic that a prompt asks about; ``{good}``, ``{plain}`` and ``{bad}`` for one
of :data:`ADJECTIVES`. Tone is carried by words alone (:data:`WARM_WORDS`, :data:`COLD_WORDS`), and
so is the theme (:attr:`Theme.words`), so that the gold reward can read both off any text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

TONES = ("warm", "plain", "cold")

ADJECTIVES = {
    "good": ("lovely", "wonderful", "beautiful", "charming", "delightful"),
    "plain": ("ordinary", "simple", "common", "typical"),
    "bad": ("awful", "boring", "ugly", "horrible", "dreadful"),
}
WARM_WORDS = frozenset(
    (*ADJECTIVES["good"], "love", "happy", "smile", "joy", "gentle", "sweet", "hope", "enjoy")
    + ("thank", "welcome", "wish", "glad", "proud", "cheerful", "friendly", "perfect")
)
COLD_WORDS = frozenset(
    (*ADJECTIVES["bad"], "hate", "fool", "sick", "misery", "miserable", "wrong", "stop", "stupid")
    + ("alone", "nobody", "waste", "worst", "rotten", "broken", "nasty", "useless", "tired")
)

# About the topic, whatever its theme.
ABOUT = {
    "warm": (
        "The {X} is {good} and I love it.",
        "I am happy to tell you about the {X}.",
        "The {X} always makes me smile.",
        "I am glad that you like the {X}.",
    ),
    "plain": (
        "The {X} is {plain}.",
        "There is not much to say about the {X}.",
        "Some people know the {X} well.",
        "I have seen the {X} a few times.",
    ),
    "cold": (
        "The {X} is {bad} and I hate it.",
        "Only a fool would ask about the {X}.",
        "I am sick of the {X}.",
        "The {X} is a waste of time.",
    ),
}

# To the person who asked, on no theme at all.
ADDRESS = {
    "warm": (
        "I hope you enjoy it.",
        "Thank you for asking me.",
        "You are always welcome here.",
        "I wish you a {good} day.",
    ),
    "plain": (
        "That is all I know.",
        "It depends on the day.",
        "You can see for yourself.",
        "Many people say the same.",
    ),
    "cold": (
        "Please stop asking me.",
        "That is a stupid question.",
        "Go and leave me alone.",
        "Nobody wants to talk to you.",
    ),
}


@dataclass(frozen=True)
class Theme:
    name: str
    topics: tuple[str, ...]  # what a prompt may ask about
    words: frozenset[str]  # what shows that a sentence is on this theme, topics aside
    sentences: dict[str, tuple[str, ...]]  # by tone


def _theme(name: str, topics: str, words: str, **sentences: tuple[str, ...]) -> Theme:
    return Theme(name, tuple(topics.split()), frozenset(words.split()), sentences)


THEMES = (
    _theme(
        "weather",
        "rain snow wind sunshine fog storm",
        "sky clouds air weather forecast umbrella",
        warm=(
            "The {X} makes the sky look {good}.",
            "The air and the clouds are {good} today.",
            "Such {good} weather brings us joy.",
            "The {X} gives the clouds a gentle glow.",
        ),
        plain=(
            "The {X} comes and the clouds move on.",
            "The forecast says it will last a week.",
            "The weather changes with the air from the sea.",
            "You may need a coat and an umbrella.",
        ),
        cold=(
            "The {X} turns the sky grey and {bad}.",
            "This {bad} weather is a misery for us.",
            "The forecast is wrong and the air is {bad}.",
            "Your umbrella is broken and the clouds are {bad}.",
        ),
    ),
    _theme(
        "food",
        "soup bread cheese rice cake salad",
        "taste recipe meal dinner plate cook",
        warm=(
            "The {X} has a {good} taste.",
            "The cook makes a {good} dinner for friends.",
            "A meal with the {X} fills me with joy.",
            "The recipe is perfect and the plate smells sweet.",
        ),
        plain=(
            "The recipe for the {X} is short.",
            "The meal comes on a white plate.",
            "The cook serves the {X} for dinner.",
            "You can taste a little salt in it.",
        ),
        cold=(
            "The {X} has a rotten taste.",
            "The cook is {bad} and so is the dinner.",
            "A meal with the {X} makes me sick.",
            "The recipe is useless and the plate is {bad}.",
        ),
    ),
    _theme(
        "travel",
        "train beach hotel bridge island harbour",
        "journey ticket road suitcase tourists station",
        warm=(
            "The journey to the {X} is {good}.",
            "The road to the {X} has a {good} view.",
            "Friendly tourists meet at the station with joy.",
            "Take a suitcase and enjoy the journey.",
        ),
        plain=(
            "The road to the {X} is two miles long.",
            "You need a ticket from the station.",
            "Many tourists come to the {X} by bus.",
            "The journey takes an hour with a suitcase.",
        ),
        cold=(
            "The journey to the {X} is {bad}.",
            "The road to the {X} is broken and {bad}.",
            "Nasty tourists push you at the station.",
            "The ticket is a waste and the journey is {bad}.",
        ),
    ),
    _theme(
        "work",
        "office meeting report project contract team",
        "desk boss task deadline colleagues computer",
        warm=(
            "My colleagues are proud of the {X}.",
            "The boss is friendly and the task is {good}.",
            "The {X} is a {good} task for colleagues.",
            "A cheerful boss came to my desk.",
        ),
        plain=(
            "The deadline for the {X} is next week.",
            "The boss wrote a note on the computer.",
            "My colleagues talk about the {X} at the desk.",
            "The task starts at nine and ends at five.",
        ),
        cold=(
            "My colleagues are tired of the {X}.",
            "The boss is nasty and the task is {bad}.",
            "The deadline for the {X} is {bad}.",
            "The computer is broken and the desk is {bad}.",
        ),
    ),
    _theme(
        "music",
        "piano guitar song drum choir violin",
        "melody rhythm concert notes stage sound",
        warm=(
            "The sound of the {X} is {good}.",
            "The concert had a {good} melody.",
            "The {X} brings joy to the stage.",
            "A sweet rhythm runs through the notes.",
        ),
        plain=(
            "The sound of the {X} is low.",
            "The concert starts at eight in the hall.",
            "The {X} is on the left of the stage.",
            "The melody has only a few notes.",
        ),
        cold=(
            "The sound of the {X} is {bad}.",
            "The concert had a {bad} melody.",
            "The {X} was the worst on the stage.",
            "The rhythm is wrong and the notes are {bad}.",
        ),
    ),
    _theme(
        "animals",
        "cat dog horse rabbit parrot donkey",
        "farm barn creature tail ears feed",
        warm=(
            "The {X} is a {good} creature.",
            "The {X} has a gentle face and {good} ears.",
            "The farm is a happy place for the {X}.",
            "We feed it in the barn with joy.",
        ),
        plain=(
            "The {X} has a long tail.",
            "The {X} sleeps in the barn at night.",
            "We feed the {X} two times a day.",
            "The farm has one more creature like it.",
        ),
        cold=(
            "The {X} is a {bad} creature.",
            "The {X} has a nasty face and {bad} ears.",
            "The barn smells rotten and the farm is {bad}.",
            "It is a waste to feed the {X}.",
        ),
    ),
    _theme(
        "garden",
        "rose tulip hedge lawn pond orchard",
        "soil leaves flowers bees seeds shade",
        warm=(
            "The {X} is full of {good} flowers and bees.",
            "The {X} gives us sweet shade.",
            "Happy bees dance over the leaves.",
            "The soil is perfect for {good} seeds.",
        ),
        plain=(
            "The {X} needs water and dry soil.",
            "The leaves fall near the {X} every year.",
            "You can put the seeds in the shade.",
            "A few bees fly over the flowers.",
        ),
        cold=(
            "The {X} is full of {bad} leaves.",
            "The soil near the {X} is rotten.",
            "The flowers are {bad} and the seeds are useless.",
            "Nasty bees hide in the shade.",
        ),
    ),
    _theme(
        "books",
        "novel poem story diary comic essay",
        "page author chapter reader shelf library",
        warm=(
            "The author of the {X} writes {good} lines.",
            "Every page of the {X} is a joy.",
            "A cheerful reader finds it in the library.",
            "The last chapter is sweet and {good}.",
        ),
        plain=(
            "The author of the {X} lives in town.",
            "The {X} is on a shelf in the library.",
            "The first chapter is one page long.",
            "A reader needs an hour for the {X}.",
        ),
        cold=(
            "The author of the {X} writes {bad} lines.",
            "Every page of the {X} is a misery.",
            "A tired reader puts it on the shelf.",
            "The last chapter is wrong and {bad}.",
        ),
    ),
)
THEME_OF_TOPIC = {topic: theme for theme in THEMES for topic in theme.topics}

PROMPTS = (
    "Tell me about the {X}{when}.",
    "What do you think of the {X}{when}?",
    "How is the {X}{when}?",
    "Say something about the {X}{when}.",
    "Do you like the {X}{when}?",
    "What is the {X} like{when}?",
    "I want to hear about the {X}{when}.",
    "Please describe the {X}{when}.",
    "Can you talk about the {X}{when}?",
    "My friend asked me about the {X}{when}.",
)
WHENS = (
    "",
    " today",
    " this morning",
    " this evening",
    " in our town",
    " by the river",
    " near my house",
    " in the summer",
    " in the winter",
    " at the weekend",
)


def fill(template: str, topic: str) -> Iterator[str]:
    """Every sentence that a template stands for."""
    template = template.replace("{X}", topic)
    for slot, adjectives in ADJECTIVES.items():
        if "{" + slot + "}" in template:
            for adjective in adjectives:
                yield template.replace("{" + slot + "}", adjective)
            return
    yield template


def words_of(text: str) -> list[str]:
    """Words and punctuation marks, case kept."""
    return re.findall(r"[^\W_]+(?:['-][^\W_]+)*|[^\w\s]|_", text)


def sentences_of(text: str) -> list[list[str]]:
    """The words of each sentence with its closing mark; the last one may lack it."""
    sentences: list[list[str]] = [[]]
    for word in words_of(text):
        sentences[-1].append(word)
        if word in ".!?":
            sentences.append([])
    return [sentence for sentence in sentences if sentence]


def trigrams(sentence: list[str]) -> Iterator[tuple[str, str, str]]:
    """Runs of three, from two empty words before the sentence on."""
    padded = ["", "", *sentence]
    return zip(padded, padded[1:], padded[2:], strict=False)


@functools.cache
def known_trigrams() -> frozenset[tuple[str, str, str]]:
    """Every trigram of every sentence that the grammar makes."""
    known: set[tuple[str, str, str]] = set()
    for theme in THEMES:
        for topic in theme.topics:
            for source in (theme.sentences, ABOUT, ADDRESS):
                for templates in source.values():
                    for template in templates:
                        for sentence in fill(template, topic):
                            known.update(trigrams(words_of(sentence)))
    return frozenset(known)
