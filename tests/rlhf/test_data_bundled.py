"""The bundled task: its bytes, its gold reward and what cannot fool it, its tokenizer."""

import statistics

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hydra_rlhf.data import generate_demo
from hydra_rlhf.data.bundled import build_tokenizer, demo_pairs, demo_prompts, gold_reward
from hydra_rlhf.data.demo_grammar import ABOUT, ADDRESS, ADJECTIVES, THEMES, TONES, fill, words_of
from hydra_rlhf.data.gold import GoldTerms, gold_terms, themes_of, tone_of

RAIN = "Tell me about the rain."
GOOD = (
    " The rain makes the sky look lovely. The air and the clouds are charming today."
    " I hope you enjoy it."
)
TEST_PROMPTS = [p.prompt for p in demo_prompts("test")]


@pytest.fixture(scope="module")
def tokenizer():
    pairs = demo_pairs("train")
    return build_tokenizer(t for p in pairs for t in (p.prompt, p.chosen, p.rejected))


def test_files_are_what_the_generator_makes(tmp_path):
    generate_demo.main([str(tmp_path)])
    bundled = generate_demo.__file__.replace("generate_demo.py", "bundled")
    for name in generate_demo.SIZES:
        with open(f"{bundled}/{name}.jsonl", "rb") as file:
            assert file.read() == (tmp_path / f"{name}.jsonl").read_bytes(), name


def test_another_seed_makes_other_files(monkeypatch):
    monkeypatch.setattr(generate_demo, "SIZES", {"train": 2, "test": 2, "prompts": 2})
    assert generate_demo.generate(1)["test"] != generate_demo.generate(2)["test"]


def test_no_prompt_occurs_twice():
    prompts = [p.prompt for p in demo_pairs("train") + demo_pairs("test")] + TEST_PROMPTS
    assert len(set(prompts)) == len(prompts)
    assert [p.prompt for p in demo_prompts("train")] == prompts[: len(demo_pairs("train"))]


@pytest.fixture(scope="module")
def golds():
    """Of the chosen and of the rejected answers of the training pairs."""
    pairs = demo_pairs("train")
    return (
        [gold_reward(p.prompt, p.chosen) for p in pairs],
        [gold_reward(p.prompt, p.rejected) for p in pairs],
    )


def test_labels_are_right_nearly_always(golds):
    margins = [chosen - rejected for chosen, rejected in zip(*golds, strict=True)]
    assert 0.88 < statistics.mean(m > 0 for m in margins) < 0.94
    assert min(map(abs, margins)) >= generate_demo.MIN_MARGIN


def test_chosen_answers_leave_headroom(golds):
    assert 0.4 < statistics.mean(golds[0]) < 0.65
    assert sum(gold > 0.9 for gold in golds[0]) > 30


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_words_show_tone_and_theme_of_every_sentence(theme):
    for tone in TONES:
        for source in (theme.sentences, ABOUT, ADDRESS):
            for template in source[tone]:
                for text in fill(template, theme.topics[0]):
                    words = words_of(text)
                    assert tone_of(words) == tone, text
                    if source is theme.sentences:
                        assert themes_of(words) == {theme.name}, text
                        assert theme.words & {word.lower() for word in words}, text


def test_gold_by_hand():
    # 20 known words in three warm sentences, which name the rain, its sky, air and clouds.
    terms = gold_terms(RAIN, GOOD)
    assert terms == GoldTerms(*[1.0] * 7)
    assert gold_reward(RAIN, GOOD) == gold_reward(RAIN, GOOD.strip() + "\n") == 1
    # Nothing about the rain; 15 words; one sentence warm, one cold, one plain.
    other = " The concert had a lovely melody. Leave me alone. The novel is on the table."
    terms = gold_terms(RAIN, other)
    assert (terms.relevance, terms.length, terms.ending) == (0, 1, 1)
    assert terms.tone == pytest.approx((1 + 0 + 0.4) / 3)
    # 6 words, half way from 2 to 10; the topic and one word of its theme; a rude word. Of the 7
    # trigrams the grammar has the first two, at "The" and at "The forecast".
    rude = " The forecast for rain is wrong."
    assert gold_terms(RAIN, rude) == GoldTerms(0, 1, 1, 0.75, 0, 0.5, 1)
    # Only the ending is missing.
    assert gold_reward(RAIN, GOOD[: GOOD.index(" you enjoy")]) == pytest.approx(0.85)


WORSE = {
    "plain instead of kind": GOOD.replace("I hope you enjoy it.", "That is all I know."),
    "rude instead of kind": GOOD.replace("I hope you enjoy it.", "Leave me alone."),
    "cut off": GOOD[: GOOD.index(" it.")],
    "strays": GOOD.replace("I hope you enjoy it.", "The novel is lovely and I love it."),
    "repeats": GOOD + " I hope you enjoy it.",
    "short": " The rain makes the sky look lovely.",
    "long": GOOD + " The rain is charming and I love it. Such wonderful weather brings us joy.",
    "not grammar": GOOD.replace("makes the sky look", "sky makes look the"),
    "another topic": GOOD.replace("rain", "snow"),
}  # fmt: skip


@pytest.mark.parametrize("worse", WORSE.values(), ids=WORSE)
def test_every_ingredient_counts(worse):
    assert worse != GOOD
    assert gold_reward(RAIN, worse) < gold_reward(RAIN, GOOD) - 0.03


DEGENERATE = {
    "empty": lambda prompt: "",
    "full stop": lambda prompt: ".",
    "one word": lambda prompt: " lovely" * 16 + ".",
    "topic only": lambda prompt: f" {prompt.split(' the ')[1].split()[0].strip('?.')}" * 16,
    "copied prompt": lambda prompt: " " + prompt,
    "copied prompt twice": lambda prompt: f" {prompt} {prompt}",
    "positive adjectives": lambda prompt: " " + " ".join(ADJECTIVES["good"] * 3) + ".",
    "memorised answer": lambda prompt: GOOD,
    "one sentence again and again": lambda prompt: " I hope you enjoy it." * 4,
    "no theme": lambda prompt: " I hope you enjoy it. Thank you for asking. I wish you a good day.",
    "every topic": lambda prompt: " " + " ".join(t for theme in THEMES for t in theme.topics),
    "scrambled": lambda prompt: " " + " ".join(sorted(GOOD.split())),
}  # fmt: skip


@pytest.mark.parametrize("policy", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_policies_score_badly(policy, golds):
    mean = statistics.mean(gold_reward(prompt, policy(prompt)) for prompt in TEST_PROMPTS)
    assert mean < statistics.mean(golds[0] + golds[1]) < 0.5


@pytest.mark.parametrize("text", ["", " ", "\x00", "🙂🙂", "_", "?!", "a" * 10_000, "rain\n\nrain"])
def test_gold_is_bounded_on_any_text(text):
    assert 0.0 <= gold_reward(RAIN, text) < 0.2
    assert 0.0 <= gold_reward(text, GOOD) <= 0.3 + 0.7 * ("rain" in text)


def test_tokenizer_saved_beside_a_model_loads_unchanged(tokenizer, tmp_path):
    # In one folder with a Llama: AutoTokenizer must not make a Llama tokenizer of it.
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == ("<pad>", "<s>", "</s>")
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert (loaded.padding_side, loaded.model_max_length) == ("left", 256)
    for pair in demo_pairs("test"):
        text = pair.prompt + pair.chosen
        ids = loaded(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"]
        assert ids == loaded(pair.prompt)["input_ids"] + loaded(pair.chosen)["input_ids"]
        assert loaded.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["Zoë’s 🙂 naïve café", "tab\tline\n\n  end ", "x .  y , z", "日本"]
)
def test_tokenizer_brings_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_knows_the_task_by_words(tokenizer):
    pairs = demo_pairs("test")
    assert len(tokenizer) <= 1024
    assert torch.tensor([len(tokenizer(p.chosen)["input_ids"]) for p in pairs]).max() <= 64
    words = sum(len(words_of(p.chosen)) for p in pairs)
    assert sum(len(tokenizer(p.chosen)["input_ids"]) for p in pairs) < 1.05 * words


def test_refusals():
    with pytest.raises(ValueError, match="one of .*train.*test.*got 'valid'"):
        demo_pairs("valid")
    with pytest.raises(ValueError, match="at least 259, got 100"):
        build_tokenizer(["a"], 100)
