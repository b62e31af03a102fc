"""TRL's formats, and rows shaped like those of the sets that RLHF papers use."""

import json

import pytest

from hydra_rlhf.data import (
    Demonstration,
    Preference,
    Prompt,
    load_preferences,
    load_prompts,
    load_sft,
)
from hydra_rlhf.data.bundled import build_tokenizer
from hydra_rlhf.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "How is the sky?"}
GOOD = {"role": "assistant", "content": "Blue."}
BAD = {"role": "assistant", "content": "Go away."}
CHAT = Preference("<user>How is the sky?</s><assistant>", "Blue.</s>", "Go away.</s>")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer(["How is the sky?"], 300)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_preference(write):
    path = write(
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " a lie.", "margin": 2, "id": 7},
        {"prompt": "A", "chosen": " b", "rejected": " c", "score_chosen": 4.5, "score_rejected": 3},
        {"prompt": "A", "chosen": " b", "rejected": " c", "margin": None},
    )
    pairs = load_preferences(path)
    assert pairs == [
        Preference("The sky is", " blue.", " a lie.", 2.0, {"id": 7}),
        Preference("A", " b", " c", 1.5),
        Preference("A", " b", " c"),
    ]
    assert load_prompts(path) == [
        Prompt(p.prompt, {"chosen": p.chosen, "rejected": p.rejected, **p.extra}) for p in pairs
    ]
    assert load_sft(path) == [Demonstration(p.prompt, p.chosen, p.extra) for p in pairs]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),  # not "The sky is bl"
        ("Blue.", "Black.", ""),
        ("Q: sky?\nblue", "Q: sky?\nred", "Q: sky?\n"),
        ("The sky is", "The sky is blue.", "The sky is"),
    ],
)
def test_implicit_prompt(write, chosen, rejected, prompt):
    (pair,) = load_preferences(write({"chosen": chosen, "rejected": rejected}))
    assert pair == Preference(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
    ids=["explicit", "implicit", "prompt repeated"],
)
def test_conversations_take_the_chat_template(write, tokenizer, row):
    path = write(row)
    assert load_preferences(path, tokenizer=tokenizer) == [CHAT]
    columns = {"chosen": CHAT.chosen, "rejected": CHAT.rejected, "prompt_messages": [USER]}
    assert load_prompts(path, tokenizer=tokenizer) == [Prompt(CHAT.prompt, columns)]


def test_messages_and_prompt_lists(write, tokenizer):
    demonstration = Demonstration(CHAT.prompt, CHAT.chosen)
    for row in ({"messages": [USER, GOOD]}, {"prompt": [USER], "completion": [GOOD]}):
        assert load_sft(write(row), tokenizer=tokenizer) == [demonstration]
        columns = {"completion": CHAT.chosen, "prompt_messages": [USER]}
        assert load_prompts(write(row), tokenizer=tokenizer) == [Prompt(CHAT.prompt, columns)]
    path = write({"prompt": [USER]})
    prompts = [Prompt(CHAT.prompt, {"prompt_messages": [USER]})]
    assert load_prompts(path, tokenizer=tokenizer) == prompts
    path = write({"prompt": [USER, {"role": "assistant", "content": "It is"}]})
    (prompt,) = load_prompts(path, tokenizer=tokenizer)
    assert prompt.prompt == "<user>How is the sky?</s><assistant>It is"


def test_conversations_need_a_chat_template(write):
    path = write({"messages": [USER, GOOD]})
    with pytest.raises(UserError, match="line 1: .*chat template; no tokenizer was given"):
        load_sft(path)
    with pytest.raises(UserError, match="this tokenizer has none"):
        load_sft(path, tokenizer=build_tokenizer(["a"], 300))


def test_a_template_that_refuses(write, tokenizer):
    strict = build_tokenizer(["a"], 300)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="line 1: the chat template refuses.*must alternate"):
        load_sft(write({"messages": [USER, GOOD]}), tokenizer=strict)


def test_completions_and_text(write):
    path = write({"prompt": "The sky is", "completion": " blue."})
    assert load_sft(path) == [Demonstration("The sky is", " blue.")]
    assert load_prompts(path) == [Prompt("The sky is", {"completion": " blue."})]
    assert load_sft(write({"text": "The sky."})) == [Demonstration("", "The sky.")]
    assert load_prompts(write({"prompt": "The sky is"})) == [Prompt("The sky is")]


# ---- the papers' sets


def test_gpt4_instructions(write):
    path = write(
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": " La.\n"},
        {"instruction": "Sing.", "input": None, "output": "La."},
    )
    assert load_sft(path) == [
        Demonstration("Instruction: Add.\n\nInput: 1, 2\n\nResponse:", " 3"),
        Demonstration("Instruction: Sing.\n\nResponse:", " La."),
        Demonstration("Instruction: Sing.\n\nResponse:", " La."),
    ]


def test_pairs_in_alpacas_columns(write):
    """Not an implicit prompt, which would leave out the instruction."""
    row = {"instruction": "Say it.", "input": "sky", "chosen": "Blue.", "rejected": "Black."}
    path = write({**row, "history": [], "system": None}, {**row, "input": "", "system": "Be kind."})
    assert load_preferences(path) == [
        Preference("Instruction: Say it.\n\nInput: sky\n\nResponse:", " Blue.", " Black."),
        Preference("Be kind.\n\nInstruction: Say it.\n\nResponse:", " Blue.", " Black."),
    ]
    with pytest.raises(UserError, match="line 1: column 'history': earlier turns are not read"):
        load_preferences(write({**row, "history": [["a", "b"]]}))


def test_sharegpt(write, tokenizer):
    human, gpt = {"from": "human", "value": "How is the sky?"}, {"from": "gpt", "value": "Blue."}
    worse = {"from": "gpt", "value": "Go away."}
    path = write({"conversations": [human, gpt], "id": 3}, {"conversations": [USER, GOOD]})
    demonstration = Demonstration(CHAT.prompt, CHAT.chosen)
    assert load_sft(path, tokenizer=tokenizer) == [
        Demonstration(CHAT.prompt, CHAT.chosen, {"id": 3}),
        demonstration,
    ]
    pair = {"conversations": [human], "chosen": gpt, "rejected": worse}
    path = write(pair, {**pair, "chosen": [GOOD], "system": "Be kind."})
    assert load_preferences(path, tokenizer=tokenizer) == [
        CHAT,
        Preference("<system>Be kind.</s>" + CHAT.prompt, CHAT.chosen, CHAT.rejected),
    ]
    kept = [prompt.extra["prompt_messages"] for prompt in load_prompts(path, tokenizer=tokenizer)]
    assert kept == [[USER], [{"role": "system", "content": "Be kind."}, USER]]
    (prompt,) = load_prompts(write({"conversations": [human, gpt]}), tokenizer=tokenizer)
    assert prompt.extra == {"completion": CHAT.chosen, "prompt_messages": [USER]}


def test_gpt4_comparisons(write):
    answers = [
        {"response": "ok", "source": "text-davinci-003", "score": 6.0},
        {"response": "great", "source": "gpt4", "score": 9.0},
        {"response": "bad", "source": "opt-iml", "score": "6"},
    ]
    path = write({"user_input": "Sing.", "responses_and_scores": answers})
    prompt = "Instruction: Sing.\n\nResponse:"
    assert load_preferences(path) == [
        Preference(prompt, " great", " ok", 3.0),
        Preference(prompt, " great", " bad", 3.0),
    ]
    assert load_sft(path) == [Demonstration(prompt, " great")]
    assert load_prompts(path) == [Prompt(prompt, {"chosen": " great", "rejected": " ok"})]


def oasst(role, text, *replies, **more):
    message = {"message_id": text, "role": role, "text": text, "lang": "en", "deleted": False}
    return {**message, "review_result": True, "replies": list(replies), **more}


def oasst_row():
    second = oasst("prompter", "And then?", oasst("assistant", "Night.", rank=None))
    tree = oasst(
        "prompter",
        "Sky?",
        oasst("assistant", "Dunno.", rank=2),
        oasst("assistant", "Blue.", second, rank=0),
        oasst("assistant", "Blueish.", rank=1),
        oasst("assistant", "Spam!", rank=3, deleted=True),
        oasst("assistant", "Refused!", rank=4, review_result=False),
    )
    return {"message_tree_id": "t1", "tree_state": "ready_for_export", "prompt": tree}


def test_oasst_trees(write):
    path = write(oasst_row())
    extra = {"message_tree_id": "t1"}
    first = "\n\nHuman: Sky?\n\nAssistant:"
    assert load_preferences(path) == [
        Preference(first, " Blue.", " Blueish.", None, extra),
        Preference(first, " Blue.", " Dunno.", None, extra),
        Preference(first, " Blueish.", " Dunno.", None, extra),
    ]
    second = "\n\nHuman: Sky?\n\nAssistant: Blue.\n\nHuman: And then?\n\nAssistant:"
    assert load_sft(path) == [
        Demonstration(first, " Blue.", extra),
        Demonstration(second, " Night.", extra),
    ]
    asked = [prompt.extra["prompt_messages"] for prompt in load_prompts(path)]
    assert [[turn["content"] for turn in turns] for turns in asked] == [
        ["Sky?"],
        ["Sky?", "Blue.", "And then?"],
    ]


def flat(tree, node, parent=None):
    """A tree's messages one by one, the last replies first."""
    message = {key: value for key, value in node.items() if key != "replies"}
    rows = [{**message, "message_tree_id": tree, "parent_id": parent}]
    for reply in reversed(node["replies"]):
        rows += flat(tree, reply, node["message_id"])
    return rows


def test_oasst_messages_are_put_into_their_trees(write):
    tree = oasst_row()
    first, second = flat("t1", tree["prompt"]), flat("t2", tree["prompt"])
    pairs = load_preferences(write(tree, {**tree, "message_tree_id": "t2"}))
    assert len(pairs) == 6
    # A message comes before its parent; another's parent is not there.
    lost = {**first[1], "message_id": "lost", "parent_id": "gone"}
    assert load_preferences(write(*reversed(first), lost, *second)) == pairs
    with pytest.raises(UserError, match="line 1: message tree t1: no message without a parent"):
        load_preferences(write(*first[1:]))
    with pytest.raises(UserError, match="line 2: message tree t1: a message without an id"):
        load_preferences(write(first[0], {**first[1], "message_id": None}))


def test_oasst_trees_take_a_chat_template_that_is_there(write, tokenizer):
    pair = load_preferences(write(oasst_row()), tokenizer=tokenizer)[0]
    assert (pair.prompt, pair.chosen) == ("<user>Sky?</s><assistant>", "Blue.</s>")


def test_deep_oasst_trees_do_not_exhaust_the_stack(tmp_path):
    tree = oasst("assistant", "end", rank=0)
    for depth in range(100):
        tree = oasst("assistant", f"a{depth}", oasst("prompter", f"p{depth}", tree), rank=0)
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps({"prompt": oasst("prompter", "start", tree)}))
    assert len(load_sft(path)) == 101


SUMMARIES = [{"text": " Sad.", "policy": "sup2"}, {"text": "Sad story.", "policy": "ref"}]
POST = {"id": "t3", "post": "I am sad.\n", "title": "Sad", "subreddit": "AskReddit"}


@pytest.mark.parametrize(
    ("info", "prompt"),
    [
        (POST, "SUBREDDIT: r/AskReddit\n\nTITLE: Sad\n\nPOST: I am sad.\n\nTL;DR:"),
        ({"post": None, "article": "News."}, "Article: News.\n\nTL;DR:"),
    ],
)
@pytest.mark.parametrize("choice", [0, 1])
@pytest.mark.parametrize("columnar", [False, True])
def test_summarize_from_feedback(write, info, prompt, choice, columnar):
    summaries = {"text": [s["text"] for s in SUMMARIES]} if columnar else SUMMARIES
    row = {"info": info, "summaries": summaries, "choice": choice, "worker": "w", "extra": None}
    texts = [" Sad.", " Sad story."]
    assert load_preferences(write(row)) == [
        Preference(prompt, texts[choice], texts[1 - choice], None, {"worker": "w"})
    ]


def test_stack_exchange_paired(write):
    row = {"qid": 1, "question": "Why?\n", "response_j": "So.", "response_k": "No.", "date": "d"}
    assert load_preferences(write(row)) == [
        Preference("Question: Why?\n\nAnswer:", " So.", " No.", None, {"qid": 1, "date": "d"})
    ]


def test_hh_rlhf(write):
    shared = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Sky?\n\nAssistant:"
    path = write({"chosen": shared + " Blue.", "rejected": shared + " Blue, no."})
    assert load_preferences(path) == [Preference(shared, " Blue.", " Blue, no.")]
    with pytest.raises(UserError, match="line 1: .*share no transcript"):
        load_preferences(write({"chosen": shared, "rejected": "\n\nHuman: no"}))


# ---- rows that cannot be used


BAD_ROWS = {
    "number for text": ({"prompt": "a", "chosen": 3, "rejected": "b"}, "'chosen'.*text.*a number"),
    "null": ({"prompt": "a", "chosen": None, "rejected": "b"}, "'chosen' is null"),
    "text for messages": ({"prompt": [USER], "chosen": "x", "rejected": "y"}, "list of messages"),
    "no messages": ({"chosen": [], "rejected": [USER]}, "'chosen'.*empty"),
    "no role": ({"chosen": [{"content": "x"}], "rejected": [USER]}, "'role', found nothing"),
    "null content": (
        {"chosen": [{"role": "user", "content": None}], "rejected": [USER]},
        "message 1: expected text in 'content', found null",
    ),
    "messages are text": ({"chosen": ["x"], "rejected": ["y"]}, "message 1 is text"),
    "nothing shared": ({"chosen": [GOOD], "rejected": [BAD]}, "different messages"),
    "alike": ({"chosen": "x y", "rejected": "x y"}, "the same"),
    "surrogate in a message": (
        {"chosen": [{"role": "user", "content": "\ud800"}], "rejected": [USER]},
        "'chosen': character 1 is half",
    ),
    "surrogate": ({"prompt": "a", "chosen": "\ud800", "rejected": "b"}, "surrogate pair"),
    "margin": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "number, found 'x'"),
    "infinite margin": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("inf")},
        "margin is inf",
    ),
    "choice": ({"info": POST, "summaries": SUMMARIES, "choice": 2}, "0 or 1, found 2"),
    "one summary": ({"info": POST, "summaries": SUMMARIES[:1], "choice": 0}, "two summaries"),
    "empty info": ({"info": {}, "summaries": SUMMARIES, "choice": 0}, "'post' or an 'article'"),
    "scores": ({"user_input": "a", "responses_and_scores": "b"}, "a list, found text"),
    "score": (
        {"user_input": "a", "responses_and_scores": [{"response": "b", "score": True}]},
        "'score'.*found true or false",
    ),
    "prompt": ({"prompt": {"role": "system"}, "chosen": "", "rejected": ""}, "text, found an obj"),
    "tool turn": (
        {"conversations": [{"from": "tool", "value": "a"}], "chosen": [GOOD], "rejected": [BAD]},
        "'conversations': message 1: expected a turn of human, gpt or system, found 'tool'",
    ),
    "turn": (
        {"conversations": "a", "chosen": [GOOD], "rejected": [BAD]},
        "'conversations': expected a list of messages, found text",
    ),
    "tree role": ({"prompt": {"text": "a", "role": "system"}}, "found 'system'"),
    "tree text": ({"prompt": {"text": 3, "role": "prompter"}}, "'text'.*a number"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows(write, row, message, tokenizer):
    with pytest.raises(UserError, match=f"rows.jsonl, line 1: .*{message}") as error:
        load_preferences(write(row), tokenizer=tokenizer)
    assert "\n" not in str(error.value)


def test_a_later_row_without_the_columns(write):
    path = write({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"})
    with pytest.raises(UserError, match=r"line 2: no column 'rejected' \(found: 'prompt', 'chos"):
        load_preferences(path)


def test_wrong_columns_name_the_known_formats(write):
    with pytest.raises(UserError) as error:
        load_preferences(write({"question": "a", "answer": "b"}))
    assert "found 'question', 'answer'; known formats: preference (prompt, chosen" in str(
        error.value
    )


def test_too_little_in_a_format(write):
    with pytest.raises(UserError, match="prompt-completion has no pairs; formats with pairs: pref"):
        load_preferences(write({"prompt": "a", "completion": "b"}))
    with pytest.raises(UserError, match="prompt-only has no answers"):
        load_sft(write({"prompt": "a"}))
    with pytest.raises(UserError, match="format text has no prompts"):
        load_prompts(write({"text": "a"}))
    with pytest.raises(UserError, match="line 1: the prompt is empty"):
        load_prompts(write({"prompt": " "}))


def test_a_format_asked_for_by_name(write):
    path = write({"text": "a", "prompt": "b"})
    assert load_prompts(path) == [Prompt("b", {"text": "a"})]
    assert load_sft(path, format="text") == [Demonstration("", "a", {"prompt": "b"})]
    with pytest.raises(UserError, match="unknown data format 'trl'; known formats: preference, "):
        load_sft(path, format="trl")
    with pytest.raises(UserError, match="line 1: no column 'chosen'"):
        load_preferences(path, format="preference")


# ---- lengths


PAIR = {"prompt": "abcdefgh", "chosen": "12", "rejected": "1234"}  # a token a character


def test_overlong_examples(write):
    letters = build_tokenizer(["~"], 259)
    path = write(PAIR, {**PAIR, "rejected": "123456"})
    fits = {"tokenizer": letters, "max_length": 13}
    with pytest.raises(UserError, match="line 2: the prompt and 'rejected' have 15 .*has 13"):
        load_preferences(path, **fits)
    assert load_preferences(path, **fits, overlong="drop") == [Preference(*PAIR.values())]
    pairs = load_preferences(path, **fits, overlong="truncate")
    # The longer answer has room for 3 tokens at least (a quarter), the prompt for the other 9.
    assert pairs[1] == Preference("abcdefgh", "12", "1234")
    for max_length in (5, 9):  # 9: room for the end, but not for a token before it
        with pytest.raises(UserError, match=f"line 1: the prompt has 8 .*context of {max_length}"):
            load_preferences(path, tokenizer=letters, max_length=max_length)
    cut = load_preferences(path, tokenizer=letters, max_length=5, overlong="truncate")
    assert cut == [Preference("fgh", "1", "1"), Preference("fgh", "1", "1")]
    with pytest.raises(UserError, match="no preferences in it"):
        load_preferences(path, tokenizer=letters, max_length=5, overlong="drop")
    with pytest.raises(UserError, match="at least 3 tokens, got 2"):
        load_preferences(path, tokenizer=letters, max_length=2)
    with pytest.raises(UserError, match="error, drop or truncate, got 'cut'"):
        load_preferences(path, overlong="cut")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        load_preferences(path, max_length=9)


def test_overlong_prompts(write):
    letters = build_tokenizer(["~"], 259)
    path = write({"prompt": "abcd"}, {"prompt": "abcdé"})  # é is two bytes, so two tokens
    assert len(load_prompts(path, tokenizer=letters, max_length=6)) == 2
    with pytest.raises(UserError, match="line 2: the prompt has 6 tokens"):
        load_prompts(path, tokenizer=letters, max_length=5)
    cut = load_prompts(path, tokenizer=letters, max_length=5, overlong="truncate")
    assert [p.prompt for p in cut] == ["abcd", "bcdé"]
    kept = load_prompts(path, tokenizer=letters, max_length=5, overlong="drop", limit=1)
    assert [p.prompt for p in kept] == ["abcd"]
