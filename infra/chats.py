"""What a chat may hold: in a row of a data file, and in a task's Example.

`chat` and `tools` bring it into the form that chat templates take. They refuse what a template
would leave out without a word.
"""

import json

from infra.ranks import InputError

# Further texts that a message may have, beside role and content.
TEXTS = "name", "tool_call_id", "reasoning_content"


def chat(messages: object, where: str) -> list[dict]:
    """The messages, checked. where: the row or the example, as an InputError names it."""
    if not isinstance(messages, (list, tuple)) or not all(isinstance(m, dict) for m in messages):
        messages = []
    if not messages:
        raise InputError(
            f'{where} has no prompt: it must be a list of {{"role": ..., "content": ...}}'
        )
    checked = [_message(message, where, f"message {i}") for i, message in enumerate(messages)]
    if all(message["role"] == "assistant" for message in checked):
        raise InputError(f"{where} has no prompt: all of its messages are the assistant's")
    return checked


def tools(value: object, where: str) -> tuple[dict, ...]:
    """What the chat template says that the policy may call. value: a list of objects, or its JSON
    text."""
    if _is_empty(value):
        return ()
    return tuple(_objects(value, where, "tools"))


def _message(given: dict, where: str, which: str) -> dict:
    """One message, without what is empty. which: "message 3"."""
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise InputError(f'{where} has no role in {which}: it must be a text, such as "user"')
    message = {"role": role, "content": _content(given.get("content"), where, which)}
    for name, value in given.items():
        if name in message or _is_empty(value):
            continue
        if name == "tool_calls":
            calls = _objects(value, where, f"tool_calls in {which}")
            message[name] = [_with_arguments(call) for call in calls]
        elif name not in TEXTS:
            raise InputError(
                f"{where} has {name!r} in {which}, which no chat template is given: a "
                f"message may have role, content, tool_calls, {', '.join(TEXTS)}"
            )
        elif not isinstance(value, str):
            raise InputError(
                f"{where} has a {name} in {which} that is no text: {str(value)[:40]!r}"
            )
        else:
            message[name] = value
    if message["content"] is None and "tool_calls" not in message:
        raise InputError(f"{where} has no content in {which}: it must be a text")
    return message


def _is_empty(value: object) -> bool:
    """Whether there is no value. In a parquet table a message has the keys of all messages, with
    None where it has no value."""
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def _content(content: object, where: str, which: str) -> str | None:
    """A text, or None. A list of texts becomes one text, a line each, as in vLLM's server."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise InputError(f"{where} has content in {which} that is no text: {str(content)[:40]!r}")
    texts = []
    for part in content:  # {"type": "text", "text": ...}
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(
                f"{where} has content of type {kind!r} in {which}: a policy reads nothing but text"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _objects(value: object, where: str, what: str) -> list[dict]:
    """A list of objects. value: the list, or its JSON text: a table can keep objects with
    different keys only as text."""
    try:
        objects = json.loads(value if isinstance(value, str) else json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        objects = None
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        raise InputError(
            f"{where} has {what} that are no list of JSON objects: {str(value)[:40]!r}"
        )
    return objects


def _with_arguments(call: dict) -> dict:
    """A tool call whose arguments are the object. OpenAI's format has its JSON text, which a
    template would quote."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
