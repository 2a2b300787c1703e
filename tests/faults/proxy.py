"""A proxy in front of an S3 server that fails in the ways real stores and networks do.

    python -m tests.faults.proxy LISTEN_PORT TARGET_PORT PLAN_FILE

The plan is JSON: ``kind`` (a name of KINDS), ``share`` of the requests that fail, and ``seed``. It
is read again for each request, so that a test sets it between two runs. The number of faults so far
stands in PLAN_FILE.count.
"""

import asyncio
import json
import random
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
from aiohttp import web

_SLOW_S = 0.2
_HOP_BY_HOP = {"transfer-encoding", "connection", "keep-alive"}

Forward = Callable[[], Awaitable[web.Response]]


async def busy(request: web.Request, forward: Forward) -> web.StreamResponse:
    """Answer as S3 does when it is asked too often."""
    return _error(503, "SlowDown")


async def expired(request: web.Request, forward: Forward) -> web.StreamResponse:
    """Answer as S3 does when a token has expired."""
    return _error(403, "AccessDenied")


async def reset(request: web.Request, forward: Forward) -> web.StreamResponse:
    """Close the connection without a word."""
    request.transport.close()
    return web.Response()


async def slow(request: web.Request, forward: Forward) -> web.StreamResponse:
    """Answer late."""
    await asyncio.sleep(_SLOW_S)
    return await forward()


async def cut(request: web.Request, forward: Forward) -> web.StreamResponse:
    """Announce the whole body, send half of it and close."""
    answer = await forward()
    body = answer.body or b""
    response = web.StreamResponse(status=answer.status, headers=answer.headers)
    response.content_length = len(body)
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    request.transport.close()
    return response


async def lost_answer(request: web.Request, forward: Forward) -> web.StreamResponse:
    """Do what was asked, and say that it failed."""
    await forward()
    return _error(500, "InternalError")


KINDS = {f.__name__: f for f in (busy, expired, reset, slow, cut, lost_answer)}


def _error(status: int, code: str) -> web.Response:
    body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>"
    return web.Response(status=status, body=body, content_type="application/xml")


class Proxy:
    """Forwards requests, but for those that the plan lets fail."""

    def __init__(self, target: str, plan: Path) -> None:
        self._target, self._plan = target, plan
        self._number = self._faults = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        plan = json.loads(self._plan.read_text())
        self._number += 1
        fails = random.Random(f"{plan['seed']} {self._number}").random() < plan["share"]

        async def forward() -> web.Response:
            return await self._forward(request, body)

        if not fails:
            return await forward()
        self._faults += 1
        self._plan.with_suffix(".count").write_text(str(self._faults))
        return await KINDS[plan["kind"]](request, forward)

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(
                request.method,
                f"{self._target}{request.raw_path}",
                headers=request.headers,
                data=body,
                allow_redirects=False,
            ) as answer,
        ):
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_BY_HOP}
            return web.Response(status=answer.status, headers=kept, body=await answer.read())


def main(listen_port: str, target_port: str, plan: str) -> None:
    app = web.Application(client_max_size=2**30)
    proxy = Proxy(f"http://127.0.0.1:{target_port}", Path(plan))
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    web.run_app(app, host="127.0.0.1", port=int(listen_port), print=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
