"""A local judge for the tests: an OpenAI-compatible endpoint that behaves as it is told to."""

import asyncio
import json
import re
import threading
from collections.abc import Callable

from aiohttp import web


class Server:
    """answer: makes a reply of a request's body and number. A reply is the judge's message,
    (status, text), (status, text, headers), or seconds to stall for. delay: seconds before it."""

    def __init__(self, answer: Callable, delay: float = 0.0):
        self.answer, self.delay = answer, delay
        self.requests: list[dict] = []
        self.in_flight = self.most_in_flight = 0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self.loop).result()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.options = f"--judge-url {self.url} --judge-model m"  # of train.py and eval.py

    async def _start(self) -> int:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._handle)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        return site._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result()

    async def _handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        key = request.headers.get("Authorization")
        self.requests.append({"body": body, "key": key, "query": request.query_string})
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delay)
            reply = self.answer(body, len(self.requests))
            if isinstance(reply, (int, float)):
                await asyncio.sleep(reply)
                reply = (500, "late")
            if isinstance(reply, tuple):
                status, text, *headers = reply
                return web.Response(
                    status=status, body=text.encode(), headers=headers[0] if headers else None
                )
            message = {"role": "assistant", "content": reply}
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            return web.json_response({"choices": [{"message": message}], "usage": usage})
        finally:
            self.in_flight -= 1

    def prompts(self) -> list[str]:
        """What was asked, in the order of the requests."""
        return [prompt_of(request["body"]) for request in self.requests]


def prompt_of(body: dict) -> str:
    return body["messages"][0]["content"]


def response_of(body: dict) -> str:
    """The response that is to be graded, as the judge sees it: quoted."""
    _, _, end = prompt_of(body).partition("Response to grade:\n")
    return end.splitlines()[0]


def names(body: dict) -> list[str]:
    """The verdicts that a request asks for."""
    properties = body["response_format"]["json_schema"]["schema"]["properties"]
    return [name for name, kind in properties.items() if kind["type"] == "boolean"]


def graded(body: dict, number: int) -> str:
    """A response's own word: which of the criteria it meets, such as "meets 1 3"."""
    met = re.findall(r"\d+", response_of(body))
    return json.dumps({name: name.removeprefix("criterion_") in met for name in names(body)})


def yes(body: dict, number: int) -> str:
    return json.dumps(dict.fromkeys(names(body), True))


if __name__ == "__main__":  # for measuring: every verdict is true, after 50 ms
    print(Server(yes, delay=0.05).url, flush=True)
    threading.Event().wait()
