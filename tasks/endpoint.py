"""A judge's endpoint, OpenAI-compatible: sends one question and returns the message of the answer.

Retries are openai's. What is sent, and what fails, is counted and noted here. What a message means
is read in verdicts.py.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import httpx2
import openai
from pydantic import AliasPath, BaseModel, Field, ValidationError

from config import JudgeOptions
from infra.ranks import InputError

# A hundred verdicts and an explanation take a thousand tokens, brief thoughts as many. A context of
# 8,192 then has room for 6,000 tokens of conversation. Without a limit, an answer that repeats
# itself would fill the context.
MAX_TOKENS = 2048
# The limit of models that think, and have the room. They call it max_completion_tokens.
MAX_WITH_THOUGHTS = 8192

# openai does not retry if it is told to wait for more than two minutes. Here --judge-timeout
# decides; it is at most 1e5.
openai._base_client.MAX_RETRY_AFTER_DELAY = 1e5


class Completion(BaseModel, strict=True):
    """What is read of a reply. Odd numbers of tokens must not cost the verdict."""

    message: str | None = Field(validation_alias=AliasPath("choices", 0, "message", "content"))
    finish: str | None = Field(None, validation_alias=AliasPath("choices", 0, "finish_reason"))
    prompt_tokens: object = Field(0, validation_alias=AliasPath("usage", "prompt_tokens"))
    completion_tokens: object = Field(0, validation_alias=AliasPath("usage", "completion_tokens"))


class Endpoint:
    """Where a judge is asked: its address, key and parameters. counts: what happens is added to it.

    The key, if one is needed, is in the environment variable JUDGE_API_KEY. Raises InputError for a
    URL that cannot be used.
    """

    def __init__(self, options: JudgeOptions, counts: Counter):
        self.model = options.judge_model
        self.parameters = {"temperature": 0, "max_tokens": MAX_TOKENS}  # of every question
        self.counts = counts
        self.unanswered = 0  # questions in a row that met their deadline; the judge counts them
        self.last_failure = ""  # what the last request that failed was told
        self.key = os.environ.get("JUDGE_API_KEY", "")
        http = openai.DefaultAioHttpClient()  # aiohttp takes half the time of httpx
        http.send = functools.partial(self._send, http.send)  # each request, retries too
        try:
            self.url = completions(options.judge_url)
            self.client = openai.AsyncOpenAI(
                base_url=self.url,
                api_key=self.key or "none",
                max_retries=10**6,  # the judge's deadline ends requests and retries alike
                timeout=None,
                http_client=http,
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise InputError(f"--judge-url {options.judge_url} is no URL: {error}") from error

    async def ask(self, prompt: str, response_format: dict, **options) -> str:
        """The message of the answer. options: openai's, of this request.

        Raises ConnectionError if there is no answer, ValueError if it is of no use.
        """
        body = {
            "model": self.model,
            **self.parameters,
            "messages": [{"role": "user", "content": prompt}],
            "response_format": response_format,
        }
        try:  # chat.completions.create converts what it sends and gets, and takes twice the time
            reply = await self.client.post(
                self.url, body=body, cast_to=httpx2.Response, options=options
            )
        except openai.OpenAIError as error:
            raise ConnectionError(self.last_failure) from error
        self.unanswered = 0
        text = self._text(reply)
        try:
            completion = Completion.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(f"no chat completion with a message: {text[:80]!r}") from error
        for name in ("prompt_tokens", "completion_tokens"):
            tokens = getattr(completion, name)
            if isinstance(tokens, int):
                self.counts[name] += tokens
        message = completion.message or ""  # null: there was nothing but thoughts
        if completion.finish == "length":  # its end may be a quotation of the response
            limit = self.parameters.get("max_tokens", MAX_WITH_THOUGHTS)
            raise ValueError(f"cut off after {limit} tokens: {message[:80]!r}")
        return message

    async def _send(self, send: Callable, request: httpx2.Request, **options) -> httpx2.Response:
        """One request of the HTTP client. openai retries silently, so it is counted here."""
        self.counts["requests"] += 1
        self.counts["retries"] += request.headers["x-stainless-retry-count"] != "0"
        try:
            response = await send(request, **options)
        except (httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
            cause = error.__cause__ or error  # what httpx calls aiohttp's errors misleads
            self.last_failure = on_one_line(f"{type(cause).__name__}: {cause}")
            # openai would not retry all of these errors.
            raise httpx2.TransportError(self.last_failure) from error
        if response.status_code != 200:
            status = f"HTTP {response.status_code}: {self._text(response)}"
            self.last_failure = on_one_line(status)[:200]
            if wait := response.headers.get("retry-after"):
                self.last_failure += f" (Retry-After: {wait})"
        return response

    def _text(self, response: httpx2.Response) -> str:
        """Without the key, for some endpoints quote it, and what they say is logged.

        A short key ("EMPTY") is no secret, and may be a word of the answer.
        """
        text = response.content.decode(errors="replace")
        return text.replace(self.key, "***") if len(self.key) >= 8 else text


def completions(url: str) -> str:
    """The address of requests: --judge-url with /chat/completions once, before its query."""
    parts = urlsplit(url)
    base = parts.path.rstrip("/").removesuffix("/chat/completions")
    return urlunsplit(parts._replace(path=base + "/chat/completions"))


def on_one_line(text: str) -> str:
    return " ".join(text.split())


def without_refused(parameters: dict, error: BaseException | None) -> dict:
    """The parameters without those that the endpoint's error names.

    OpenAI's models that think have a temperature of their own, and another name for the limit.
    """
    accepted = dict(parameters)
    if isinstance(error, (openai.BadRequestError, openai.UnprocessableEntityError)):
        refusal = error.response.text
        if "temperature" in refusal:
            accepted.pop("temperature", None)
        # "support" is missing where the limit is only too large for a context.
        if "max_tokens" in refusal and "support" in refusal and "max_tokens" in accepted:
            del accepted["max_tokens"]
            accepted["max_completion_tokens"] = MAX_WITH_THOUGHTS
    return accepted
