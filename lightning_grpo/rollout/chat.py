"""Chat messages: read from a row, and rendered by a tokenizer's template."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from lightning_grpo.errors import ConfigError
from lightning_grpo.templates import check_template, num_marks_behind


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rollouts use."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Render messages, to text or to token ids."""
        ...

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Turn text into token ids."""
        ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """Turn token ids into text."""
        ...


Message = Mapping[str, Any]
_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

_PRINTED = re.compile(r"\s*\[?\s*\{\s*'(role|content|from|value)':")
_WRITTEN = re.compile(r'\s*\[?\s*\{\s*"(role|content|from|value)"\s*:')
_DECIDED = (
    "conversation",
    "messages",
    "chat_template",
    "tokenize",
    "tokenizer_kwargs",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
    "add_generation_prompt",
    "continue_final_message",
    "padding",
    "truncation",
    "max_length",
)


# -- rows -----------------------------------------------------------------------------------------


def read_content(value: Any) -> str | list[dict[str, Any]]:
    """What a column asks: its text, or its chat messages with the keys that templates know.

    Messages may come as a list, one alone, a dictionary of columns (as `datasets` keeps them), text
    in JSON or as Python prints it, or NumPy and Arrow values; under `role` and `content`, or
    ShareGPT's `from` and `value`.

    Raises:
        ConfigError: It is neither, and what it is instead.
    """
    found = _plain(value)
    if isinstance(found, str):
        found = _from_text(found)
        if isinstance(found, str):
            return found
    if isinstance(found, dict):
        found = _rows(found)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        shown = "" if isinstance(found, list | dict) else f" ({found!r:.40})"
        raise ConfigError(
            f"it must hold text or a list of chat messages, got {type(found).__name__}{shown}."
        )
    if not found:
        raise ConfigError("it holds an empty list of chat messages.")
    return [_message(each, number) for number, each in enumerate(found)]


def _plain(value: Any) -> Any:
    """Arrow's and NumPy's values as Python's own."""
    if hasattr(value, "as_py"):
        value = value.as_py()
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _from_text(text: str) -> Any:
    """Messages that were written as JSON or printed by Python; any other text as it is."""
    if not text.lstrip().startswith(("[", "{", '"[', '"{')):
        return text
    try:
        parsed = json.loads(text)
        parsed = json.loads(parsed) if isinstance(parsed, str) else parsed  # written as JSON twice
    except (ValueError, RecursionError) as error:
        if _WRITTEN.match(text) and not _is_followed_by_words(error):
            raise ConfigError(
                f"it begins as chat messages in JSON, and can't be read: {error}. Write a list of "
                "messages, or read it with `transform`."
            ) from None
        parsed = _from_printed(text)
    wrapped = list(parsed.values()) if isinstance(parsed, dict) else []
    return parsed if any(_is_chat(each) for each in (parsed, [parsed], *wrapped)) else text


def _is_followed_by_words(error: Exception) -> bool:
    """Whether a text goes on behind its JSON, and not by more JSON: a question about it."""
    if not isinstance(error, json.JSONDecodeError) or error.msg != "Extra data":
        return False
    return not _WRITTEN.match(error.doc[error.pos :].lstrip(", \n\r\t"))


def _from_printed(text: str) -> Any:
    """What Python printed of messages, as a table keeps a column of lists."""
    if not _PRINTED.match(text):
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise ConfigError(
            "it holds chat messages as they were printed, which can't be read back. Write them as "
            "JSON, or read them with `transform`."
        ) from None


def _is_chat(found: Any) -> bool:
    """Whether a list begins as a conversation does; the rest of it may still be wrong."""
    if not isinstance(found, list) or not found:
        return False
    spoken = all(isinstance(each, dict) and ("role" in each or "from" in each) for each in found)
    return spoken and _is_message(found[0])


def _is_message(each: Mapping[str, Any]) -> bool:
    return ("role" in each and "content" in each) or ("from" in each and "value" in each)


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One message alone, or the messages of a dictionary of columns."""
    if not _is_message(found):
        raise ConfigError(
            "it must hold text or a list of chat messages, got a dictionary with the keys "
            f"{sorted(map(str, found))}. Pick what is asked with `transform`."
        )
    if not isinstance(found.get("role", found.get("from")), list):
        return [found]
    columns = {key: each for key, each in found.items() if isinstance(each, list)}
    lengths = {key: len(each) for key, each in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"its columns of chat messages must be of one length, got {lengths}.")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _message(raw: Mapping[str, Any], number: int) -> dict[str, Any]:
    """One message with the keys that templates know, without those that say nothing."""
    kept = {key: value for key, value in raw.items() if value is not None and value != []}
    share_gpt = "role" not in kept and "from" in kept
    role = kept.pop("from" if share_gpt else "role", None)
    content = kept.pop("value" if "value" in kept and "content" not in kept else "content", None)
    if role is not None and not isinstance(role, str):
        raise ConfigError(f"the role of message {number} must be a text, got {role!r:.40}.")
    if role is None:
        raise ConfigError(
            f"message {number} must have a `role` and a `content` (or ShareGPT's `from` and "
            f"`value`), got the keys {sorted(map(str, raw))}. Rename them with `transform`."
        )
    known = _ROLES.get(role.lower())
    if known is None and share_gpt:
        raise ConfigError(
            f"message {number} is from {role!r}, which is none of {', '.join(_ROLES)}. Give it the "
            "role that the chat template knows, with `transform`."
        )
    if content is None and "tool_calls" not in kept:
        raise ConfigError(f"message {number} ({role}) has no content.")
    if "tool_calls" in kept:
        kept["tool_calls"] = [call_of(call) for call in kept["tool_calls"]]
    try:
        return {"role": known or role, "content": text_of(content), **kept}
    except ConfigError as error:
        raise ConfigError(f"message {number} ({role}): {error}") from None


def text_of(content: Any) -> str:
    """A message's content as one text; most templates would print a list of parts as Python does.

    Raises:
        ConfigError: Some of it is no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list | tuple) else [content]
    texts = [part if isinstance(part, str) else _text_of_part(part) for part in parts]
    return "".join(texts)


def _text_of_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    if isinstance(text, str) and part.get("type", "text") in ("text", "input_text", "output_text"):
        return text
    kind = part.get("type", sorted(part)) if isinstance(part, Mapping) else type(part).__name__
    raise ConfigError(f"only text can be a message's content, got a part of {kind!r}.")


def call_of(call: Any) -> dict[str, Any]:
    """A message's tool call as templates expect it: the arguments an object, not JSON.

    Raises:
        ConfigError: It is none.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigError("every tool call must be an object with a `function` that has a `name`.")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise ConfigError("a tool call's `arguments` must be JSON.") from None
    named = {"name": function["name"], "arguments": arguments}
    return {"id": call.get("id"), "type": "function", "function": named}


# -- templates ------------------------------------------------------------------------------------


def spellable(value: Any) -> Any:
    """The same with U+FFFD for halves of surrogate pairs: JSON spells them, no tokenizer does."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {spellable(name): spellable(each) for name, each in value.items()}
    return [spellable(each) for each in value] if isinstance(value, list | tuple) else value


class TemplatedTokenizer:
    """A tokenizer whose chat template always gets some arguments; all else is the tokenizer's.

    Args:
        tokenizer: The tokenizer.
        arguments: Of its template, by name.
    """

    def __init__(self, tokenizer: Tokenizer, arguments: Mapping[str, Any]) -> None:
        self._tokenizer: Any = tokenizer
        self._arguments = dict(arguments)

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Render messages; arguments that are given here go before those from the start."""
        return self._tokenizer.apply_chat_template(conversation, **{**self._arguments, **kwargs})

    def __getattr__(self, name: str) -> Any:
        if name == "_tokenizer":  # not there while a copy is made
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer's."""
        return self._tokenizer(*args, **kwargs)

    def __len__(self) -> int:
        """How many tokens it has."""
        return len(self._tokenizer)


def with_arguments(tokenizer: Tokenizer, arguments: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer, with the arguments that its chat template is to get; none leave it as it is.

    Raises:
        ConfigError: The template doesn't know one of them.
    """
    if not arguments:
        return tokenizer
    template = str(tokenizer.chat_template or "")
    unknown = [name for name in arguments if not re.search(rf"\b{re.escape(name)}\b", template)]
    if unknown:
        raise ConfigError(
            f"`template_kwargs` must name what the tokenizer's chat template reads, got "
            f"{unknown[0]!r}, which stands nowhere in it. Correct the name, or leave it out."
        )
    return cast(Tokenizer, TemplatedTokenizer(tokenizer, arguments))


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that are not the template's, but decided here."""
    decided = [name for name in arguments if name in _DECIDED]
    if decided:
        raise ConfigError(
            f"`template_kwargs` must be variables of the chat template (such as enable_thinking), "
            f"got {decided[0]!r}, which is decided by what is rendered. Leave it out."
        )


def without_blank_answer(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages without an answer at their end that says nothing: it was not begun."""
    told = [dict(message) for message in messages]
    last = told[-1] if told else {}
    blank = last.get("role") == "assistant" and not text_of(last.get("content")).strip()
    return told[:-1] if blank and len(told) > 1 and not last.get("tool_calls") else told


def rendering(messages: Sequence[Message], tools: Sequence[Any] | None = None) -> dict[str, Any]:
    """How to render messages so that the policy goes on from them.

    A new answer begins, or the last message, if it is the assistant's own, is continued.
    """
    last = messages[-1]
    if last["role"] != "assistant":
        how: dict[str, Any] = {"add_generation_prompt": True}
    elif last.get("tool_calls"):
        raise ConfigError(
            "the last message is a tool call of the assistant, which can't be continued. Add the "
            "tool's result, or leave the call out."
        )
    else:
        how = {"continue_final_message": True}
    return {**how, "tools": list(tools)} if tools else how


def fitting(
    tokenizer: Tokenizer, messages: Sequence[Message], how: Mapping[str, Any], first: int = 0
) -> list[dict[str, Any]]:
    """The messages in a form of which the chat template says all.

    Most templates want texts, and the arguments of tools as objects; some want parts, or JSON.

    Args:
        tokenizer: Whose template it is.
        messages: What is to be said.
        how: How they are rendered.
        first: The first message that is looked at.

    Raises:
        ConfigError: It leaves a message out, in any form.
    """
    plain = [dict(message) for message in messages]
    check_template(tokenizer, plain)
    refusal: ConfigError | None = None
    for form in (dict, _with_json_arguments, _with_parts):
        formed = [form(message) for message in plain]
        if form is not dict and formed == plain:
            continue
        try:
            left_out = _left_out(tokenizer, formed, how, first)
        except Exception:  # noqa: BLE001 - the template's, which is told where no form will do
            continue
        if not left_out:
            return formed
        refusal = refusal or ConfigError(
            f"the tokenizer's chat template leaves out {left_out}: the policy would never read "
            "it. Say it in a role that the template knows (the user's, with `transform`), or use a "
            "tokenizer whose template knows this one."
        )
    if refusal is not None:
        raise refusal
    try:
        tokenizer.apply_chat_template(plain, tokenize=False, **how)
    except Exception as error:
        roles = ", ".join(str(message["role"]) for message in plain)
        raise ConfigError(
            f"the tokenizer's chat template takes no messages of the roles {roles}: {error}. Say "
            "it in roles that the template knows (with `transform`), or use another tokenizer."
        ) from error
    return plain


def _left_out(
    tokenizer: Tokenizer, messages: Sequence[Message], how: Mapping[str, Any], first: int
) -> str:
    """What a template leaves out, in words.

    It renders the messages with a mark in the place of each text and each tool's name. (That a text
    is found says little: it may be a single letter, and templates trim and escape.)
    """
    marked = [dict(message) for message in messages]
    marks: dict[str, str] = {}
    for number, message in enumerate(marked[first:], start=first):
        role, mark = f"the role {message['role']!r}", f"WORDS{number}END"
        own = message["role"] == "assistant"
        content = message.get("content")
        if text_of(content).strip() or message["role"] == "tool":  # a result may be empty
            message["content"] = mark if isinstance(content, str) else _parts(mark)
            marks[mark] = "the assistant's own words" if own else f"what {role} says"
        calls = [dict(call) for call in message.get("tool_calls") or ()]
        for index, call in enumerate(calls):
            name = f"CALL{number}X{index}END"
            call["function"] = {**call["function"], "name": name}
            marks[name] = f"a tool call of {role}"
        if calls:
            message["tool_calls"] = calls
    tools = [dict(tool) for tool in how.get("tools") or ()]
    told = " ".join(text_of(message.get("content")) for message in messages)
    for index, tool in enumerate(tools):
        name = tool["function"]["name"]
        tool["function"] = {**tool["function"], "name": f"TOOL{index}END"}
        if name not in told:  # a system message may describe it
            marks[f"TOOL{index}END"] = f"the tool {name!r}"
    how = {**how, "tools": tools} if tools else how
    text = str(tokenizer.apply_chat_template(marked, tokenize=False, **how))
    if first:  # what is said later must stand behind it, too: some templates begin with the system
        text = text[max(0, text.find(next(iter(marks), ""))) :]
    return next((words for mark, words in marks.items() if mark not in text), "")


def _with_json_arguments(message: Message) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": _json(call["function"])}}
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else dict(message)


def _json(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments") or {}
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_parts(message: Message) -> dict[str, Any]:
    return {**message, "content": _parts(text_of(message.get("content")))}


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text to go on from: with the mark that begins a text, without one that ends it."""
    ids = list(tokenizer.encode(text))
    return ids[: len(ids) - num_marks_behind(tokenizer)]
