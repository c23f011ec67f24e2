"""What holds for every HTTP request: it has an id, and HEAD asks for GET's headers."""

from __future__ import annotations

import re
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

ID_HEADER = b"x-request-id"
_ID = re.compile(rb"[!-~]{1,128}")


class Edge:
    """ASGI middleware. The id is the client's X-Request-Id where that can be one; every answer has it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = _name(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (ID_HEADER, name)]}
            await send(message)

        if scope["method"] == "HEAD":  # the server knows the method too, and leaves the body out
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send_with_id)


def _name(scope: Scope) -> bytes:
    given: bytes = next((value for key, value in scope["headers"] if key == ID_HEADER), b"")
    return given if _ID.fullmatch(given) else b"req-" + secrets.token_hex(12).encode()
