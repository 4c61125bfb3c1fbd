"""The judge: a language model behind an OpenAI-compatible endpoint that says which items a response meets.
A verdict that cannot be had is NaN, "missing", and never a "no"."""

import asyncio
import atexit
import contextlib
import functools
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from typing import TextIO
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import httpx2
import numpy as np
import openai
from pydantic import TypeAdapter, ValidationError

from config import JudgeOptions
from infra.ranks import RANK, WORLD, InputError, gather, on_rank_0
from tasks.verdicts import PROMPT, Completion, judge_prompt, parse_verdicts, response_format

COUNTS = (
    "requests",
    "retries",
    "cached",
    "failed",
    "verdicts",
    "yes",
    "prompt_tokens",
    "completion_tokens",
    "seconds",
)

# A hundred verdicts and an explanation take a thousand tokens, brief thoughts as many; a context of 8,192 has room for
# 6,000 tokens of conversation beside it. Without a limit, an answer that repeats itself would fill the context.
MAX_TOKENS = 2048
# The limit of models that think, and have the room. They call it max_completion_tokens.
MAX_WITH_THOUGHTS = 8192

# openai does not retry if it is told to wait for more than two minutes. Here --judge-timeout
# decides; it is at most 1e5.
openai._base_client.MAX_RETRY_AFTER_DELAY = 1e5

LINE = TypeAdapter(tuple[str, dict[str, bool]])  # of a cache file: a question's hash, its verdicts


def open_cache(path: str) -> tuple[TextIO, dict[str, dict[str, bool]]]:
    """A --judge-cache, to be written to, and the verdicts in it. A line that a killed run left incomplete is passed
    over. Raises InputError if the file cannot be used, or if none of its lines is a verdict: it is something else."""
    known = {}
    try:
        file = open(path, "a+", buffering=1)  # noqa: SIM115 - for the life of the judge
        file.seek(0)
        lines = [line for line in file if line.strip()]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--judge-cache {path} cannot be read and written: {error}") from error
    for line in lines:
        with contextlib.suppress(ValueError):
            known.update([LINE.validate_json(line)])
    if lines and not known:
        raise InputError(f"--judge-cache {path} holds no verdicts: name another file, or a new one")
    if lines and not lines[-1].endswith("\n"):
        file.write("\n")
    return file, known


def completions(url: str) -> str:
    """--judge-url, with or without /chat/completions, as the address of the requests. A query stays
    one."""
    parts = urlsplit(url)
    base = parts.path.rstrip("/").removesuffix("/chat/completions")
    return urlunsplit(parts._replace(path=base + "/chat/completions"))


def without_refused(parameters: dict, error: BaseException | None) -> dict:
    """The parameters that are left if the endpoint's error names some: OpenAI's models that think
    have a temperature of their own, and call the limit by another name."""
    accepted = dict(parameters)
    if isinstance(error, (openai.BadRequestError, openai.UnprocessableEntityError)):
        said = error.response.text
        if "temperature" in said:
            accepted.pop("temperature", None)
        # Not if the limit is too large for a context.
        if "max_tokens" in said and "support" in said and accepted.pop("max_tokens", None):
            accepted["max_completion_tokens"] = MAX_WITH_THOUGHTS
    return accepted


class Judge:
    """A client in a thread, so that judging goes on while the caller samples. explain: have a reason written before the
    verdict. The key, if one is needed, is in the environment variable JUDGE_API_KEY. Raises InputError for a URL or a
    cache file that cannot be used."""

    def __init__(self, options: JudgeOptions, explain: bool = False):
        self.parameters = {"temperature": 0, "max_tokens": MAX_TOKENS}  # of every question
        self.model, self.each, self.explain = (
            options.judge_model,
            options.judge_mode == "each",
            explain,
        )
        self.timeout, self.concurrency = (
            options.judge_timeout,
            max(1, options.judge_concurrency // WORLD),
        )
        self.key = os.environ.get("JUDGE_API_KEY", "")
        # Verdicts by their question's hash, 300 bytes each: 1 GB for all of RaR.
        self.file, self.answers = (
            open_cache(options.judge_cache) if options.judge_cache else (None, {})
        )
        self.under_way: dict[str, asyncio.Future] = {}  # those that are being asked for
        self.error = self.said = (
            ""  # why a verdict is missing, what a failed request was told: the last of each
        )
        self.counts, self.failed_in_a_row, self.busy_since = dict.fromkeys(COUNTS, 0), 0, 0.0
        self.slots, self.loop = asyncio.Semaphore(self.concurrency), asyncio.new_event_loop()
        self.run = functools.partial(asyncio.run_coroutine_threadsafe, loop=self.loop)
        http = openai.DefaultAioHttpClient()  # aiohttp takes half the time of httpx
        http.send = functools.partial(
            self._send, http.send
        )  # so that each request, retries too, passes there
        try:
            self.url = completions(options.judge_url)
            # The deadline in `_ask` ends requests and retries alike.
            self.client = openai.AsyncOpenAI(
                base_url=self.url,
                api_key=self.key or "none",
                max_retries=10**6,
                timeout=None,
                http_client=http,
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise InputError(f"--judge-url {options.judge_url} is no URL: {error}") from error
        threading.Thread(target=self.loop.run_forever, daemon=True, name="judge").start()
        atexit.register(lambda: self.run(self.client.close()).result(5))

    def check(self) -> None:
        """One question, asked by rank 0. All ranks must call it. Raises InputError unless it is
        answered in the form that is needed. A parameter that the endpoint refuses is left out of
        it, and of all later questions."""
        first = self.parameters
        on_rank_0(self._find_parameters)
        self.parameters = gather([self.parameters])[0]
        self.counts = dict.fromkeys(COUNTS, 0)  # it is no question of the run
        if RANK == 0 and self.parameters != first:
            refused = " and ".join(name for name in first if name not in self.parameters)
            used = " and ".join(f"{name} {value}" for name, value in self.parameters.items())
            print(
                f"the judge {self.model} refuses {refused}: all of its questions go with {used}",
                flush=True,
            )

    def _find_parameters(self) -> None:
        """Asks until no parameter is refused."""
        chat = [{"role": "user", "content": "Say hello."}]
        items = {"criterion_1": "It is a greeting."}
        prompt = judge_prompt(chat, "Hello!", items, self.explain)
        while True:
            try:
                asked = self._post(prompt, tuple(items), {}, max_retries=0)
                return self.run(asyncio.wait_for(asked, self.timeout)).result()
            except (OSError, ValueError) as error:  # OSError: TimeoutError, too
                accepted = without_refused(self.parameters, error.__cause__)
                if accepted == self.parameters:
                    reason = str(error) or f"no answer within --judge-timeout {self.timeout:g} s"
                    raise InputError(
                        f"the judge at {self.url}, model {self.model}, cannot be "
                        f"used: {reason}; see --judge-url, --judge-model and the "
                        "environment variable JUDGE_API_KEY"
                    ) from error
                self.parameters = accepted

    def start(
        self, messages: list[dict], responses: list[str], items: list[str]
    ) -> Callable[[], np.ndarray]:
        """Begins to judge G responses to a chat by K items. Returns a function that waits for and returns (G, K): 1.0
        for an item met, 0.0 otherwise, NaN where no verdict could be had."""
        named = {f"criterion_{k}": text for k, text in enumerate(items, start=1)}
        parts = [{name: text} for name, text in named.items()] if self.each else [named]
        # All of a response's items in a row: their prompts share a prefix, which judges cache.
        questions = [(response, part) for response in responses for part in parts]

        async def grade() -> np.ndarray:
            answers = await asyncio.gather(
                *[self._answer(messages, *question) for question in questions]
            )
            met = [
                answer.get(name, np.nan)
                for (_, part), answer in zip(questions, answers, strict=True)
                for name in part
            ]
            self.counts["verdicts"] += len(met) - int(np.isnan(met).sum())
            self.counts["yes"] += int(np.nansum(met))
            return np.array(met, dtype=np.float64).reshape(len(responses), len(items))

        return self.run(grade()).result

    def take_counts(self) -> dict[str, float | str]:
        """Of all ranks, since the last call: requests sent, retries among them, verdicts found in the cache, questions
        given up, verdicts had, those of them that say yes, tokens, the seconds in which a question was under way; and
        the last reason for a missing verdict. A judge that was given up is asked again from now."""
        ranks = gather([(self.counts, self.error)])
        self.counts, self.failed_in_a_row = dict.fromkeys(COUNTS, 0), 0
        counts = {
            name: (max if name == "seconds" else sum)(counts[name] for counts, _ in ranks)
            for name in COUNTS
        }
        return {**counts, "last_error": next((error for _, error in ranks if error), "")}

    async def _answer(
        self, messages: list[dict], response: str, items: dict[str, str]
    ) -> dict[str, bool]:
        """The verdicts on items, {name: text}: from the cache, of the same question if it is under way, or asked for.
        Those that cannot be had are left out, and then none is kept."""
        text = json.dumps(
            [PROMPT, self.model, self.explain, messages, response, items]
        )  # a file may outlive PROMPT
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        if key in self.answers or key in self.under_way:
            self.counts["cached"] += len(items)
            return self.answers[key] if key in self.answers else await self.under_way[key]
        self.busy_since = self.busy_since if self.under_way else time.monotonic()
        self.under_way[key] = self.loop.create_future()
        async with self.slots:
            verdicts = await self._ask(
                judge_prompt(messages, response, items, self.explain), tuple(items)
            )
        self.under_way.pop(key).set_result(verdicts)
        self.counts["seconds"] += 0 if self.under_way else time.monotonic() - self.busy_since
        if len(verdicts) < len(items):
            self.counts["failed"] += 1
        else:
            self.answers[key] = verdicts
            if self.file:
                self.file.write(json.dumps([key, verdicts]) + "\n")
        return verdicts

    async def _ask(self, prompt: str, names: tuple[str, ...]) -> dict[str, bool]:
        """Asks until the deadline; after a malformed or incomplete answer once more, and then both answers count."""
        verdicts = {}
        # A judge that is gone may cost each slot its deadline once, but not each of thousands of questions.
        if self.failed_in_a_row >= max(8, self.concurrency):
            return verdicts
        try:
            async with asyncio.timeout(self.timeout):
                for attempt in range(2):
                    self.counts["retries"] += attempt
                    try:
                        await self._post(prompt, names, verdicts)
                        break
                    except ValueError as error:
                        self.error = f"a malformed answer: {error}"
        except TimeoutError:
            self.error = (
                f"no verdict within {self.timeout:g} s; its last reply: {self.said or 'none'}"
            )
            self.failed_in_a_row += 1
        except ConnectionError as error:
            self.error = str(error)
        return verdicts

    async def _post(
        self, prompt: str, names: tuple[str, ...], verdicts: dict[str, bool], **options
    ) -> None:
        """Adds the verdicts of one answer to those given. Raises ConnectionError if there is no answer, ValueError if
        it is of no use or if verdicts are missing still."""
        body = {
            "model": self.model,
            **self.parameters,
            "messages": [{"role": "user", "content": prompt}],
            "response_format": response_format(names, self.explain),
        }
        try:  # chat.completions.create converts what it sends and gets, and takes twice the time
            reply = await self.client.post(
                self.url, body=body, cast_to=httpx2.Response, options=options
            )
            self.failed_in_a_row, text = 0, self._text(reply)
            completion = Completion.model_validate_json(text)
        except openai.OpenAIError as error:
            raise ConnectionError(self.said) from error
        except ValidationError as error:
            raise ValueError(f"no chat completion with a message: {text[:80]!r}") from error
        for name in ("prompt_tokens", "completion_tokens"):
            tokens = getattr(completion, name)
            self.counts[name] += tokens if isinstance(tokens, int) else 0
        message = completion.message or ""  # null: there was nothing but thoughts
        if completion.finish == "length":  # its end may be a quotation of the response
            limit = self.parameters.get("max_tokens", MAX_WITH_THOUGHTS)
            raise ValueError(f"cut off after {limit} tokens: {message[:80]!r}")
        verdicts.update(parse_verdicts(message, names))
        if len(verdicts) < len(names):
            raise ValueError(
                f"no verdict in its answer, or one neither true nor false: {message[:80]!r}"
            )

    async def _send(self, send: Callable, request: httpx2.Request, **options) -> httpx2.Response:
        """One request of the HTTP client. openai retries without a word: what is sent and what fails is noted here."""
        self.counts["requests"] += 1
        self.counts["retries"] += request.headers["x-stainless-retry-count"] != "0"
        try:
            response = await send(request, **options)
        except (httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
            cause = error.__cause__ or error  # what httpx calls aiohttp's errors misleads
            self.said = " ".join(f"{type(cause).__name__}: {cause}".split())
            raise httpx2.TransportError(self.said) from error  # openai would not retry all of them
        if response.status_code != 200:
            self.said = " ".join(f"HTTP {response.status_code}: {self._text(response)}".split())[
                :200
            ]
            if wait := response.headers.get("retry-after"):
                self.said += f" (Retry-After: {wait})"
        return response

    def _text(self, response: httpx2.Response) -> str:
        """Without the key: some endpoints quote it; what they say is logged. A short one ("EMPTY") is no secret, and
        may be a word of the answer."""
        text = response.content.decode(errors="replace")
        return text.replace(self.key, "***") if len(self.key) >= 8 else text
