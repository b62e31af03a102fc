"""From message lists to text: by a tokenizer's chat template, or as a plain transcript."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydra_rlhf.data.rows import BadRow, kind_of
from hydra_rlhf.errors import UserError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Dialogue:
    """Turns messages into the text of a prompt and of its answers.

    With a tokenizer that has a chat template the text is the template's, its special tokens written
    out, so tokenize it with ``add_special_tokens=False``. ``plain`` allows a transcript where there
    is no template, ``"\\n\\nHuman: ...\\n\\nAssistant:"``, as hh-rlhf writes its dialogues.
    ``keep_messages`` is for prompts, whose rewards may need the messages in another template.
    """

    tokenizer: Any = None
    plain: bool = False
    keep_messages: bool = False

    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def render(self, prompt: Messages, answers: list[Messages]) -> tuple[str, list[str]]:
        """The prompt's text, and each answer's as the text that follows it.

        Raises:
            UserError: if there is no chat template and plain transcripts are not allowed.
            BadRow: if the template refuses the messages.
        """
        if not self._has_template():
            if not self.plain:
                raise UserError(
                    "conversational data needs a tokenizer with a chat template; "
                    + ("this tokenizer has none" if self.tokenizer else "no tokenizer was given")
                )
            return _transcript(prompt) + "\n\nAssistant:", [_answer(a) for a in answers]
        opened = bool(prompt) and prompt[-1]["role"] == "assistant"  # an answer that was begun
        text = self._template(
            prompt, add_generation_prompt=not opened, continue_final_message=opened
        )
        texts = []
        for answer in answers:
            whole = self._template([*prompt, *answer])
            if not whole.startswith(text):
                # Some templates write a message differently once another follows it.
                text = _common_prefix(text, whole)
            texts.append(whole)
        return text, [whole[len(text) :] for whole in texts]

    def columns(self, extra: dict[str, Any], prompt: Messages) -> dict[str, Any]:
        """A row's other columns, with the prompt's messages where they are kept."""
        return {**extra, "prompt_messages": prompt} if self.keep_messages else extra

    def text(self, messages: Messages) -> str:
        """All messages as one text."""
        return self._template(messages) if self._has_template() else _transcript(messages)

    def _template(self, messages: Messages, **options: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # jinja2's errors, and whatever a template raises by itself
            reason = " ".join(str(error).split())
            raise BadRow(f"the chat template refuses these messages: {reason}") from error


def messages_of(value: Any, column: str) -> Messages:
    """``value`` as a list of messages.

    Raises:
        BadRow: if it is anything else.
    """
    if not isinstance(value, list):
        raise BadRow(f"column {column!r}: expected a list of messages, found {kind_of(value)}")
    if not value:
        raise BadRow(f"column {column!r}: the list of messages is empty")
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadRow(
                f"column {column!r}: message {index + 1} is {kind_of(message)}, not an object"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = kind_of(message[key]) if key in message else "nothing"
                raise BadRow(
                    f"column {column!r}: message {index + 1}: "
                    f"expected text in {key!r}, found {found}"
                )
            check_unicode(message[key], column)
    return [{"role": message["role"], "content": message["content"]} for message in value]


def check_unicode(text: str, column: str) -> None:
    """Refuses half of a surrogate pair, which JSON can spell and no tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            f"column {column!r}: character {error.start + 1} is half of a surrogate pair"
        ) from error


def shared_messages(first: Messages, second: Messages) -> int:
    """How many messages two dialogues begin with alike."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def shared_text(first: str, second: str) -> str:
    """What two texts begin with alike, up to the space before the first word that differs."""
    prefix = _common_prefix(first, second)
    if len(prefix) in (len(first), len(second)):
        return prefix
    cut = len(prefix)
    while cut > 0 and not prefix[cut - 1].isspace():
        cut -= 1
    return prefix[:cut].rstrip(" ") if cut else ""


def _common_prefix(first: str, second: str) -> str:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return first[:length]


def _transcript(messages: Messages) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(
        f"\n\n{names.get(m['role'], m['role'].capitalize())}: {m['content']}" for m in messages
    )


def _answer(messages: Messages) -> str:
    """What follows ``"\\n\\nAssistant:"``."""
    return _transcript(messages).removeprefix("\n\nAssistant:")
