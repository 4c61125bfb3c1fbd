"""What a chat may hold, be it of a data file's row or of a task's Example.

It is brought into the form that chat templates take. What they would leave out without a word is
refused.
"""

import json

from infra.ranks import InputError

TEXTS = "name", "tool_call_id", "reasoning_content"  # of a message, beside role and content


def chat(messages: object, where: str) -> list[dict]:
    """The messages, checked. where: names the row or the example, for the InputErrors."""
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
    """What the chat template says that may be called: a list of objects, or its JSON text."""
    if _is_empty(value):
        return ()
    return tuple(_objects(value, where, "tools"))


def _message(given: dict, where: str, which: str) -> dict:
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise InputError(f'{where} has no role in {which}: it must be a text, such as "user"')
    made = {"role": role, "content": _content(given.get("content"), where, which)}
    for name, value in given.items():
        if name in made or _is_empty(value):
            continue
        if name == "tool_calls":
            calls = _objects(value, where, f"tool_calls in {which}")
            made[name] = [_with_arguments(call) for call in calls]
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
            made[name] = value
    if made["content"] is None and "tool_calls" not in made:
        raise InputError(f"{where} has no content in {which}: it must be a text")
    return made


def _is_empty(value: object) -> bool:
    """In a table a message has the keys of all others, too."""
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def _content(content: object, where: str, which: str) -> str | None:
    """A text, or None. Texts in a list are put one below the other, as vLLM's server does."""
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
    """A list of objects, or its JSON text: a table can keep objects that differ only as a text."""
    try:
        found = json.loads(value if isinstance(value, str) else json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise InputError(
            f"{where} has {what} that are no list of JSON objects: {str(value)[:40]!r}"
        )
    return found


def _with_arguments(call: dict) -> dict:
    """Arguments in OpenAI's form, a JSON text, become the object: templates would quote a text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
