"""The judge: a language model that says which items a response meets.

A verdict that cannot be had is NaN, "missing", and never a "no". One request is endpoint.py's; what
the judge is asked, and how its answer is read, is in verdicts.py.
"""

import asyncio
import atexit
import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import TextIO

import numpy as np
from pydantic import TypeAdapter

from config import JudgeOptions
from infra.ranks import RANK, WORLD, InputError, gather, on_rank_0
from tasks.endpoint import Endpoint, without_refused
from tasks.verdicts import PROMPT, judge_prompt, parse_verdicts, response_format

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

Verdicts = dict[str, bool]  # {name of an item: met}, without those that are missing
LINE = TypeAdapter(tuple[str, Verdicts])  # of a cache file: a question's hash, its verdicts


class Judge:
    """A client in a thread, so that judging goes on while the caller samples.

    explain: the judge writes a reason before its verdict. Raises InputError for a URL or a cache
    file that cannot be used.
    """

    def __init__(self, options: JudgeOptions, explain: bool = False):
        self.explain = explain
        self.each = options.judge_mode == "each"
        self.timeout = options.judge_timeout
        self.concurrency = max(1, options.judge_concurrency // WORLD)
        self.slots = asyncio.Semaphore(self.concurrency)
        # Verdicts by their question's hash, 300 bytes each: 1 GB for all of RaR.
        self.answers: dict[str, Verdicts] = {}
        self.file = None
        if options.judge_cache:
            self.file, self.answers = open_cache(options.judge_cache)
        self.under_way: dict[str, asyncio.Future] = {}  # the questions that are being asked
        self.busy_since = 0.0  # the time from which some question has been under way
        self.counts = Counter()
        self.error = ""  # why the last missing verdict is missing
        self.endpoint = Endpoint(options, self.counts)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True, name="judge").start()
        atexit.register(self._close)

    def _run(self, work: Coroutine) -> Future:
        """Begins the work in the judge's thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def _close(self) -> None:
        self._run(self.endpoint.client.close()).result(5)

    # Before the run

    def check(self) -> None:
        """Asks one question, on rank 0. All ranks must call it.

        A parameter that the endpoint refuses is left out of all questions. Raises InputError unless
        the answer has the form that is needed.
        """
        first = self.endpoint.parameters
        on_rank_0(self._find_parameters)
        accepted, *_ = gather([self.endpoint.parameters])
        self.endpoint.parameters = accepted
        self.counts.clear()  # it is no question of the run
        if RANK == 0 and accepted != first:
            refused = " and ".join(name for name in first if name not in accepted)
            used = " and ".join(f"{name} {value}" for name, value in accepted.items())
            print(
                f"the judge {self.endpoint.model} refuses {refused}: all of its questions go with "
                f"{used}",
                flush=True,
            )

    def _find_parameters(self) -> None:
        """Asks until no parameter is refused."""
        endpoint = self.endpoint
        chat = [{"role": "user", "content": "Say hello."}]
        items = {"criterion_1": "It is a greeting."}
        prompt = judge_prompt(chat, "Hello!", items, self.explain)
        while True:
            try:
                answer = self._post(prompt, tuple(items), {}, max_retries=0)
                self._run(asyncio.wait_for(answer, self.timeout)).result()
                return
            except (OSError, ValueError) as error:  # OSError: TimeoutError, too
                accepted = without_refused(endpoint.parameters, error.__cause__)
                if accepted == endpoint.parameters:
                    reason = str(error) or f"no answer within --judge-timeout {self.timeout:g} s"
                    raise InputError(
                        f"the judge at {endpoint.url}, model {endpoint.model}, cannot be "
                        f"used: {reason}; see --judge-url, --judge-model and the "
                        "environment variable JUDGE_API_KEY"
                    ) from error
                endpoint.parameters = accepted

    # A prompt's responses

    def start(
        self, messages: list[dict], responses: list[str], items: list[str]
    ) -> Callable[[], np.ndarray]:
        """Begins to judge G responses to a chat by K items.

        Returns a function that waits for and returns (G, K): 1.0 for an item met, 0.0 otherwise,
        NaN for a missing verdict.
        """
        named = {f"criterion_{k}": text for k, text in enumerate(items, start=1)}
        parts = [{name: text} for name, text in named.items()] if self.each else [named]
        # All of a response's items in a row: their prompts share a prefix, which judges cache.
        questions = [(response, part) for response in responses for part in parts]

        async def grade() -> np.ndarray:
            asked = [self._answer(messages, *question) for question in questions]
            answers = await asyncio.gather(*asked)
            met = []
            for (_, part), verdicts in zip(questions, answers, strict=True):
                met += [verdicts.get(name, np.nan) for name in part]
            self.counts["verdicts"] += len(met) - int(np.isnan(met).sum())
            self.counts["yes"] += int(np.nansum(met))
            return np.array(met, dtype=np.float64).reshape(len(responses), len(items))

        return self._run(grade()).result

    # One question

    async def _answer(self, messages: list[dict], response: str, items: dict[str, str]) -> Verdicts:
        """The verdicts on items, {name: text}. They are kept if there is one for each item.

        They come from the cache, from the same question if it is under way, or from the judge.
        """
        question = [PROMPT, self.endpoint.model, self.explain, messages, response, items]
        text = json.dumps(question)  # with PROMPT, which a cache file may outlive
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        if key in self.answers:
            self.counts["cached"] += len(items)
            return self.answers[key]
        if key in self.under_way:
            self.counts["cached"] += len(items)
            return await self.under_way[key]
        if not self.under_way:
            self.busy_since = time.monotonic()
        self.under_way[key] = self.loop.create_future()
        async with self.slots:
            prompt = judge_prompt(messages, response, items, self.explain)
            verdicts = await self._ask(prompt, tuple(items))
        self.under_way.pop(key).set_result(verdicts)
        if not self.under_way:
            self.counts["seconds"] += time.monotonic() - self.busy_since
        if len(verdicts) < len(items):
            self.counts["failed"] += 1
        else:
            self.answers[key] = verdicts
            if self.file:
                self.file.write(json.dumps([key, verdicts]) + "\n")
        return verdicts

    async def _ask(self, prompt: str, names: tuple[str, ...]) -> Verdicts:
        """Asks until the deadline.

        After a malformed or incomplete answer it asks once more, and takes what both answers say.
        """
        verdicts = {}
        # A judge that is gone costs each slot its deadline once, not each question.
        if self.endpoint.unanswered >= max(8, self.concurrency):
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
            last = self.endpoint.last_failure or "none"
            self.error = f"no verdict within {self.timeout:g} s; its last reply: {last}"
            self.endpoint.unanswered += 1
        except ConnectionError as error:
            self.error = str(error)
        return verdicts

    async def _post(
        self, prompt: str, names: tuple[str, ...], verdicts: Verdicts, **options
    ) -> None:
        """Adds the verdicts of one answer to those given.

        Raises ConnectionError if there is no answer, ValueError if it is of no use or if verdicts
        are still missing.
        """
        form = response_format(names, self.explain)
        message = await self.endpoint.ask(prompt, form, **options)
        verdicts.update(parse_verdicts(message, names))
        if len(verdicts) < len(names):
            raise ValueError(
                f"no verdict in its answer, or one neither true nor false: {message[:80]!r}"
            )

    # What is logged

    def take_counts(self) -> dict[str, float | str]:
        """Counts of all ranks since the last call, and the last reason for a missing verdict.

        requests sent, retries among them, verdicts found in the cache, questions that failed,
        verdicts had, those of them that say yes, tokens, and the seconds in which a question was
        under way. A judge that was given up is asked again from now.
        """
        ranks = gather([(dict(self.counts), self.error)])
        self.counts.clear()
        self.endpoint.unanswered = 0
        report = {}
        for name in COUNTS:
            values = [counts.get(name, 0) for counts, _ in ranks]
            report[name] = max(values) if name == "seconds" else sum(values)
        errors = [error for _, error in ranks if error]
        report["last_error"] = errors[0] if errors else ""
        return report


def open_cache(path: str) -> tuple[TextIO, dict[str, Verdicts]]:
    """A --judge-cache, to be written to, and {question's hash: verdicts} of it.

    A line that a killed run left incomplete is passed over. Raises InputError if the file cannot be
    used, or if none of its lines is a verdict: it is something else.
    """
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
