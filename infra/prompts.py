"""Chats as tokens, through the model's chat template. What a template would silently leave out of a
chat, or would ask the clock for, is dealt with here."""

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
    """What a policy is given."""

    ids: list[int]  # tokens
    example: Example  # of which they were made
    opened: str = ""  # the beginning of a thought, if the prompt ends in one, such as "<think>\n"


def encode(
    tokenizer,
    examples: list[Example],
    limit: int,
    embeddings: int = sys.maxsize,
    date: str | None = None,
    thinking: bool | None = None,
) -> list[Prompt]:
    """The prompts of the examples. limit: most tokens of one. embeddings: all ids must be below.
    date, thinking: see `template_options`. Raises InputError, also for a chat of which the template
    would leave out a part."""
    options = template_options(tokenizer, date, thinking)
    prompts = []
    for i, example in enumerate(examples):
        last = example.messages[-1]
        where = f"prompt {i} ('...{(last.get('content') or '')[-40:]!a}')"
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
                f"{where} has {len(ids)} tokens, and beside --max-tokens the model's context has "
                f"room for {limit}: leave it out of the data, or lower --max-tokens"
            )
        check_ids(ids, tokenizer, embeddings, where)
        prompts.append(Prompt(ids, example, open_thought(last, text)))
    return prompts


def today(date: str | None) -> str:
    """--date, or today's. Rank 0's, since midnight may lie between two ranks."""
    date, *_ = gather([date or datetime.date.today().isoformat()])
    return date


def template_options(tokenizer, date: str | None, thinking: bool | None) -> dict:
    """Options of the chat template. date: what it takes for today; None: the clock's. thinking:
    whether the policy may think; None: the template's own choice. Raises InputError."""
    options = {}
    if date:
        # In place of transformers' own function, which asks the clock.
        options["strftime_now"] = datetime.date.fromisoformat(date).strftime
    if thinking is not None:
        if not may_think(tokenizer):
            raise InputError(
                "--enable-thinking: the model's chat template does not know it; leave it out"
            )
        options["enable_thinking"] = thinking
    return options


def may_think(tokenizer) -> bool:
    """Whether the chat template has a choice between thinking and not thinking."""
    return "enable_thinking" in str(tokenizer.chat_template)


def render(tokenizer, messages: list[dict], tools: tuple, options: dict) -> str:
    """A chat as a prompt's text. A last message of the assistant's is left to be continued."""
    continued = messages[-1].get("role") == "assistant"
    return tokenizer.apply_chat_template(
        [with_objects(message) for message in messages],
        tools=list(tools) or None,
        tokenize=False,
        add_generation_prompt=not continued,
        continue_final_message=continued,
        **options,
    )


def with_objects(message: dict) -> dict:
    """The message, with its tool calls' arguments as objects, which vLLM's server does, too.
    OpenAI's format has them as JSON text. Templates write JSON, and would quote the text again."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        with contextlib.suppress(ValueError, TypeError, LookupError):  # no JSON text: left as is
            function = {**function, "arguments": json.loads(function["arguments"])}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def open_thought(last: dict, text: str) -> str:
    """The beginning of a thought that the response will go on with, "" if there is none. It is in
    the last message, if that is to be continued, or at the end of the text, if the template opens
    it."""
    if last.get("role") == "assistant":
        _, tag, thought = last["content"].rpartition("<think>")
        if not tag or "</think>" in thought:
            return ""
        return tag + thought
    end = re.search(r"<think>\s*$", text)
    return end[0] if end else ""


def dated(tokenizer, examples: list[Example], date: str, thinking: bool | None) -> bool:
    """Whether the prompts depend on the date."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return False
    now = template_options(tokenizer, date, thinking)
    then = template_options(tokenizer, "1999-12-31", thinking)
    for example in examples:
        chat = example.messages, example.tools
        if render(tokenizer, *chat, now) != render(tokenizer, *chat, then):
            return True
    return False


def left_out(tokenizer, example: Example, text: str, options: dict) -> str | None:
    """The part of a chat that the template leaves out without a word: without it the text is the
    same. None if there is no such part. text: the whole chat, rendered."""

    def same(messages: list[dict], tools: tuple) -> bool:
        try:
            return render(tokenizer, messages, tools, options) == text
        except (jinja2.TemplateError, TypeError, ValueError):  # the template needs the part
            return False

    messages, tools = example.messages, example.tools
    if tools and same(messages, ()):
        return "the tools"
    for i, message in enumerate(messages):
        before, after = messages[:i], messages[i + 1 :]
        without_calls = {key: value for key, value in message.items() if key != "tool_calls"}
        if message.get("tool_calls") and same([*before, without_calls, *after], tools):
            return f"the tool_calls of message {i}"
        role = message.get("role")
        if role in ("system", "user", "assistant"):  # which all templates have
            continue
        silent = {**message, "content": ""}
        if message.get("content") and same([*before, silent, *after], tools):
            return f"the content of message {i} (role {role})"
    return None
