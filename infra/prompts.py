"""Chats as tokens, through the model's chat template."""

import contextlib
import datetime
import json
import re
import sys
from typing import NamedTuple

import jinja2

from infra.pretrained import check_ids
from infra.ranks import InputError, gather
from rewards import Example


class Prompt(NamedTuple):
    ids: list[int]  # tokens
    example: Example  # what they were made of
    opened: str = ""  # a thought that the prompt begins: rewards see it as the response's beginning


def today(date: str | None) -> str:
    """--date, or today: rank 0's, for midnight may lie between two ranks."""
    return gather([date or datetime.date.today().isoformat()])[0]


def template_options(tokenizer, date: str | None, thinking: bool | None) -> dict:
    """Of the chat template. date: what it takes for today, None for the clock's. thinking: None for
    the template's own choice. Raises InputError."""
    options = {}
    if date:  # in place of transformers' own function, which asks the clock
        options["strftime_now"] = datetime.date.fromisoformat(date).strftime
    if thinking is not None:
        if not may_think(tokenizer):
            raise InputError(
                "--enable-thinking: the model's chat template does not know it; leave it out"
            )
        options["enable_thinking"] = thinking
    return options


def may_think(tokenizer) -> bool:
    return "enable_thinking" in str(tokenizer.chat_template)


def render(tokenizer, messages: list[dict], tools: tuple, options: dict) -> str:
    """A chat as a prompt's text. A last message of the assistant's is left to be continued."""
    continued = messages[-1].get("role") == "assistant"
    return tokenizer.apply_chat_template(
        [with_objects(message) for message in messages],
        tools=[*tools] or None,
        tokenize=False,
        add_generation_prompt=not continued,
        continue_final_message=continued,
        **options,
    )


def with_objects(message: dict) -> dict:
    """Its tool calls' arguments as objects, as vLLM's server has them. Templates write them as JSON,
    and would quote a text of JSON, which is OpenAI's format, once more."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        with contextlib.suppress(ValueError, TypeError, LookupError):  # no text of JSON: as it is
            function = {**function, "arguments": json.loads(function["arguments"])}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def open_thought(last: dict, text: str) -> str:
    """The beginning of the response's thought that the prompt has: in the last message, if that is
    continued, or what the template opens at the end of the text."""
    if last.get("role") == "assistant":
        _, tag, thought = last["content"].rpartition("<think>")
        return "" if "</think>" in thought else (tag and tag + thought)
    end = re.search(r"<think>\s*$", text)
    return end[0] if end else ""


def dated(tokenizer, examples: list[Example], date: str, thinking: bool | None) -> bool:
    """Whether the prompts depend on the date."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return False
    now, then = (template_options(tokenizer, day, thinking) for day in (date, "1999-12-31"))
    return any(
        render(tokenizer, example.messages, example.tools, now)
        != render(tokenizer, example.messages, example.tools, then)
        for example in examples
    )


def left_out(tokenizer, example: Example, text: str, options: dict) -> str | None:
    """The part of a chat that the template leaves out without a word. text: all of it, rendered."""

    def same(messages: list[dict], tools: tuple) -> bool:
        try:
            return render(tokenizer, messages, tools, options) == text
        except (jinja2.TemplateError, TypeError, ValueError):  # it misses the part
            return False

    messages, tools = example.messages, example.tools
    if tools and same(messages, ()):
        return "the tools"
    for i, message in enumerate(messages):
        before, after = messages[:i], messages[i + 1 :]
        called = {key: value for key, value in message.items() if key != "tool_calls"}
        if message.get("tool_calls") and same([*before, called, *after], tools):
            return f"the tool_calls of message {i}"
        role, silent = message.get("role"), {**message, "content": ""}
        common = role in ("system", "user", "assistant")  # others are not in all templates
        if not common and message.get("content") and same([*before, silent, *after], tools):
            return f"the content of message {i} (role {role})"
    return None


def encode(
    tokenizer,
    examples: list[Example],
    limit: int,
    embeddings: int = sys.maxsize,
    date: str | None = None,
    thinking: bool | None = None,
) -> list[Prompt]:
    """Through the chat template. Raises InputError for a chat that it cannot hold, and for a prompt
    of more than `limit` tokens, or with one that has no embedding."""
    options, prompts = template_options(tokenizer, date, thinking), []
    for i, example in enumerate(examples):
        where = f"prompt {i} ('...{(example.messages[-1].get('content') or '')[-40:]!a}')"
        try:
            text = render(tokenizer, example.messages, example.tools, options)
            ids = tokenizer(text, add_special_tokens=False).input_ids
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(
                f"{where} does not go through the model's chat template: {error}"
            ) from error
        if part := left_out(tokenizer, example, text, options):
            raise InputError(
                f"{where}: the model's chat template leaves out {part}: choose another "
                "model, or write it into a message's text"
            )
        if not 0 < len(ids) <= limit:
            raise InputError(
                f"{where} has {len(ids)} tokens, and beside --max-tokens the model's context has room "
                f"for {limit}: leave it out of the data, or lower --max-tokens"
            )
        check_ids(ids, tokenizer, embeddings, where)
        prompts.append(Prompt(ids, example, open_thought(example.messages[-1], text)))
    return prompts
