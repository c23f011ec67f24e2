"""Who may use the API. Default-deny: every route but those of the health probes wants the key."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from semipd.serve.errors import ApiError, response_of

OPEN_PATHS = frozenset(("/health", "/ready"))


class Guard:
    """ASGI middleware. key: what clients send as `Authorization: Bearer KEY`; None lets everybody in."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._key = key.encode() if key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_enter(scope):
            error = ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY",
                "authentication_error",
                "invalid_api_key",
            )
            await response_of(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_enter(self, scope: Scope) -> bool:
        if self._key is None or scope["path"] in OPEN_PATHS:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, token = given[0].partition(b" ")
        # Both are compared, in a time that does not depend on where they differ.
        return hmac.compare_digest(token.strip(), self._key) and scheme.lower() == b"bearer"
