"""Rows of the sets that RLHF papers use, as examples. Each function takes one row of its set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from hydra_rlhf.data.cells import extra_of, number, text
from hydra_rlhf.data.dialogue import Dialogue, Messages, check_unicode, messages_of
from hydra_rlhf.data.example import Demonstration, Preference
from hydra_rlhf.data.rows import BadRow, kind_of

ASSISTANT = "\n\nAssistant:"


def is_hh_rlhf(values: dict[str, Any]) -> bool:
    chosen = values["chosen"]
    return isinstance(chosen, str) and chosen.lstrip("\n").startswith("Human:")


def hh_rlhf(values: dict[str, Any], dialogue: Dialogue) -> Iterator[Preference]:
    """Anthropic's hh-rlhf: two transcripts that part in an answer of the assistant."""
    chosen, rejected = text(values, "chosen"), text(values, "rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    cut = chosen.rfind(ASSISTANT, 0, shared)
    if cut < 0:
        raise BadRow(
            "'chosen' and 'rejected' share no transcript up to '\\n\\nAssistant:', as hh-rlhf's do"
        )
    cut += len(ASSISTANT)
    extra = extra_of(values, "chosen", "rejected")
    yield Preference(chosen[:cut], chosen[cut:], rejected[cut:], None, extra)


def stack_exchange_paired(values: dict[str, Any], dialogue: Dialogue) -> Iterator[Preference]:
    """lvwerra/stack-exchange-paired: ``response_j`` got more votes than ``response_k``."""
    extra = extra_of(values, "question", "response_j", "response_k")
    yield Preference(
        f"Question: {text(values, 'question').strip()}\n\nAnswer:",
        _spaced(text(values, "response_j")),
        _spaced(text(values, "response_k")),
        None,
        extra,
    )


def summarize_from_feedback(values: dict[str, Any], dialogue: Dialogue) -> Iterator[Preference]:
    """OpenAI's summarize-from-feedback comparisons: a post or an article, two summaries, a choice.

    The prompt of a post is laid out as in Stiennon et al. 2020 (arXiv:2009.01325), appendix B.2.
    """
    info, summaries = _object(values, "info"), values["summaries"]
    if isinstance(summaries, dict):  # as `datasets` gives a sequence of objects: one list a field
        summaries = [{"text": summary} for summary in _list(summaries, "text")]
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise BadRow("column 'summaries': expected two summaries")
    choice = values["choice"]
    if isinstance(choice, bool) or choice not in (0, 1):
        raise BadRow(f"column 'choice': expected 0 or 1, found {choice!r:.40}")
    texts = [_spaced(text(_checked(summary, "summaries"), "text")) for summary in summaries]
    if info.get("post") is not None:
        head = [
            f"{label}: {prefix}{text(info, key)}"
            for label, key, prefix in (("SUBREDDIT", "subreddit", "r/"), ("TITLE", "title", ""))
            if info.get(key) is not None
        ]
        prompt = "\n\n".join([*head, f"POST: {text(info, 'post').strip()}", "TL;DR:"])
    elif info.get("article") is not None:
        prompt = f"Article: {text(info, 'article').strip()}\n\nTL;DR:"
    else:
        raise BadRow("column 'info': expected a 'post' or an 'article'")
    extra = extra_of(values, "info", "summaries", "choice")
    yield Preference(prompt, texts[int(choice)], texts[1 - int(choice)], None, extra)


def instruction(values: dict[str, Any], dialogue: Dialogue) -> Iterator[Demonstration]:
    """GPT-4-LLM's and Alpaca's instructions: ``instruction``, ``input`` if any, ``output``."""
    extra = extra_of(values, *_INSTRUCTION, "output")
    yield Demonstration(_instructed(values), _spaced(text(values, "output")), extra)


def instruction_pairs(values: dict[str, Any], dialogue: Dialogue) -> Iterator[Preference]:
    """LLaMA-Factory's pairs in Alpaca's columns: ``chosen`` and ``rejected`` for ``output``."""
    better, worse = (_spaced(text(values, column)) for column in ("chosen", "rejected"))
    extra = extra_of(values, *_INSTRUCTION, "chosen", "rejected")
    yield Preference(_instructed(values), better, worse, None, extra)


def sharegpt(values: dict[str, Any], dialogue: Dialogue) -> Iterator[Demonstration]:
    """ShareGPT's dialogues: turns ``from`` human or gpt, each with a ``value``."""
    turns = _turns(values)
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise BadRow("column 'conversations': expected gpt's answer as the last turn")
    prompt, (completion,) = dialogue.render(turns[:-1], [turns[-1:]])
    extra = dialogue.columns(extra_of(values, "conversations", "system"), turns[:-1])
    yield Demonstration(prompt, completion, extra)


def sharegpt_pairs(values: dict[str, Any], dialogue: Dialogue) -> Iterator[Preference]:
    """LLaMA-Factory's pairs in ShareGPT's columns: two turns that may follow the dialogue."""
    answers = []
    for column in ("chosen", "rejected"):
        answer = values[column]
        answers.append(_turn_messages(answer if isinstance(answer, list) else [answer], column))
    turns = _turns(values)
    prompt, (better, worse) = dialogue.render(turns, answers)
    extra = extra_of(values, "conversations", "system", "chosen", "rejected")
    yield Preference(prompt, better, worse, None, dialogue.columns(extra, turns))


def gpt4_comparisons(values: dict[str, Any], dialogue: Dialogue) -> Iterator[Preference]:
    """GPT-4-LLM's comparisons: answers with scores; a pair of every two whose scores differ.

    The best answer comes first. The margin is the difference of the scores.
    """
    prompt = _asked(text(values, "user_input"), "")
    scored = []
    for entry in _list(values, "responses_and_scores"):
        answer = _checked(entry, "responses_and_scores")
        scored.append((number(answer, "score"), _spaced(text(answer, "response"))))
    if any(score != score for score, _ in scored):
        raise BadRow("column 'responses_and_scores': a score is NaN")
    scored.sort(key=lambda pair: -pair[0])
    extra = extra_of(values, "user_input", "responses_and_scores")
    for i, (high, better) in enumerate(scored):
        for low, worse in scored[i + 1 :]:
            if low < high:
                yield Preference(prompt, better, worse, high - low, extra)


def oasst_tree(values: dict[str, Any], dialogue: Dialogue) -> Iterator[Preference | Demonstration]:
    """An OpenAssistant message tree: ranked answers to each prompt, at every depth.

    Every two ranked answers make a pair. A prompt without two such answers gives its best (or only)
    answer as a demonstration. Deleted messages, those that reviewers refused, and what follows them
    are left out. Without a chat template the dialogue is written as a plain transcript.
    """
    plain = dataclasses.replace(dialogue, plain=True)
    tree = {key: values[key] for key in ("message_tree_id",) if values.get(key) is not None}
    stack: list[tuple[Messages, dict[str, Any]]] = [([], _object(values, "prompt"))]
    while stack:
        before, node = stack.pop()
        role = {"prompter": "user", "assistant": "assistant"}.get(text(node, "role"))
        if role is None:
            raise BadRow(
                f"message tree: expected role prompter or assistant, found {node['role']!r}"
            )
        path = [*before, {"role": role, "content": text(node, "text")}]
        check_unicode(path[-1]["content"], "text")
        replies = [_checked(reply, "replies") for reply in node.get("replies") or []]
        replies = [reply for reply in replies if _kept(reply)]
        stack.extend((path, reply) for reply in reversed(replies))
        if role == "user" and replies:
            yield from _ranked(path, replies, plain, tree)


def _ranked(
    path: Messages, replies: list[dict[str, Any]], dialogue: Dialogue, extra: dict[str, Any]
) -> Iterator[Preference | Demonstration]:
    # Rank 0 is the best; a message that nobody ranked has none.
    ranked = [reply for reply in replies if reply.get("rank") is not None]
    ranked.sort(key=lambda reply: number(reply, "rank"))
    answers: list[Messages] = [
        [{"role": "assistant", "content": text(reply, "text")}] for reply in ranked or replies[:1]
    ]
    prompt, texts = dialogue.render(path, answers)
    extra = dialogue.columns(extra, path)
    if len(texts) < 2:
        yield Demonstration(prompt, texts[0], extra)
    for i, better in enumerate(texts):
        for worse in texts[i + 1 :]:
            yield Preference(prompt, better, worse, None, extra)


def _kept(message: dict[str, Any]) -> bool:
    return not message.get("deleted") and message.get("review_result") is not False


_INSTRUCTION = ("instruction", "input", "system", "history")


def _instructed(values: dict[str, Any]) -> str:
    """The prompt in Alpaca's columns, after the system's text where a row has one."""
    if values.get("history"):
        raise BadRow("column 'history': earlier turns are not read here; write rows as messages")
    system, given = (
        text(values, column) if values.get(column) is not None else ""
        for column in ("system", "input")
    )
    asked = _asked(text(values, "instruction"), given)
    return f"{system.strip()}\n\n{asked}" if system.strip() else asked


_ROLES = {"human": "user", "gpt": "assistant"}


def _turns(values: dict[str, Any]) -> Messages:
    turns = _turn_messages(values["conversations"], "conversations")
    if values.get("system") is not None and text(values, "system").strip():
        turns.insert(0, {"role": "system", "content": text(values, "system")})
    return turns


def _turn_messages(turns: Any, column: str) -> Messages:
    """``from`` and ``value`` as ``role`` and ``content``; turns that have these are left so."""
    if isinstance(turns, list):
        turns = [
            {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
            if isinstance(turn, dict) and isinstance(turn.get("from"), str)
            else turn
            for turn in turns
        ]
    messages = messages_of(turns, column)
    for index, message in enumerate(messages, 1):
        if message["role"] not in ("user", "assistant", "system"):
            raise BadRow(
                f"column {column!r}: message {index}: expected a turn of human, gpt or system, "
                f"found {message['role']!r:.40}"
            )
    return messages


def _asked(instruction: str, given: str) -> str:
    parts = [f"Instruction: {instruction.strip()}"]
    if given.strip():
        parts.append(f"Input: {given.strip()}")
    return "\n\n".join([*parts, "Response:"])


def _spaced(answer: str) -> str:
    """An answer as it follows a prompt that ends in a colon."""
    return " " + answer.strip()


def _checked(value: Any, column: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRow(f"column {column!r}: expected objects, found {kind_of(value)}")
    return value


def _object(values: dict[str, Any], column: str) -> dict[str, Any]:
    return _checked(values[column], column)


def _list(values: dict[str, Any], column: str) -> list[Any]:
    value = values.get(column)
    if not isinstance(value, list):
        raise BadRow(f"column {column!r}: expected a list, found {kind_of(value)}")
    return value
