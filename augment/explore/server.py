"""Who may see the page: gradio's web server for this machine, and no more of it than is needed.

Gradio brings a web server with more doors than a page of pictures needs: uploads, files, proxies.
The `Gate` before it lets through what the page itself asks for, and, on loopback, to nobody who
calls this machine by another name (as sites do that rebind theirs). With it goes a policy by which
the browser fetches nothing from anywhere else.
"""

import ipaddress
import os
import re
import warnings
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Set
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from augment.core.errors import AugmentWarning, UserError
from augment.explore.session import Explorer
from augment.explore.widgets import asset

DOORS = re.compile(
    r"/(config|theme\.css|favicon\.ico|(assets|static)/(?!.*\.\.)[\w./-]+)?|"
    r"/gradio_api/(startup-events|queue/(join|data)|heartbeat/\w+|cancel|reset|app_id)"
)
"""The paths that are served."""
POLICY = (
    "default-src 'self'; img-src 'self' data:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'"
)

Message = MutableMapping[str, Any]
Handler = Callable[..., Awaitable[Any]]
"""A request and its messages, and what takes or gives them, as ASGI has them."""


class Gate:
    """ASGI middleware: only the page's own paths, under the names of this machine.

    Args:
        app: what is behind.
        hosts: names it may be called by; None is any.
    """

    def __init__(self, app: Handler, hosts: Set[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Message, receive: Handler, send: Handler) -> None:
        """Pass on, or refuse with status 403."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), policy]}
            await send(message)

        if scope["type"] == "lifespan" or self.passes(scope):
            return await self.app(scope, receive, guarded)
        await send({"type": "http.response.start", "status": 403, "headers": []})
        return await send({"type": "http.response.body", "body": b"not served here"})

    def passes(self, scope: Message) -> bool:
        """Whether a request is one of the page's own."""
        host = dict(scope.get("headers", [])).get(b"host", b"").decode("latin-1")
        known = self.hosts is None or re.sub(r":\d+$", "", host) in self.hosts
        return scope["type"] == "http" and known and bool(DOORS.fullmatch(scope["path"]))


def require() -> None:
    """Refuse to go on without gradio.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("gradio") is None:  # not by importing it, which takes seconds
        raise UserError(
            "expected the package gradio for the explorer, got none; "
            "pip install 'latent-augment[explore]'"
        )


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(explorer: Explorer, host: str = "127.0.0.1", port: int = 7860) -> Any:
    """Serve the page, in threads of this process; gives gradio's blocks.

    Args:
        explorer: what makes the images.
        host: the address to listen at.
        port: and its port.

    Raises:
        UserError: gradio is not installed, or the port is taken.
    """
    require()
    with _without_gradio_settings():
        return _launch(explorer, host, port)


@contextmanager
def _without_gradio_settings() -> Iterator[None]:
    """Hide variables of the environment that would open folders or a public address."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith("GRADIO_")}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _launch(explorer: Explorer, host: str, port: int) -> Any:
    import gradio  # type: ignore[import-not-found]
    from starlette.middleware import Middleware  # type: ignore[import-not-found]

    from augment.explore.page import Page

    hosts = {"127.0.0.1", "localhost", "[::1]", host} if is_loopback(host) else None
    if hosts is None:
        warnings.warn(
            f"expected an address of this machine alone, got {host}; whoever reaches it sees the "
            "bank's images, and may export",
            AugmentWarning,
            stacklevel=4,
        )
    theme = gradio.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]
    )
    blocks = Page(explorer).blocks
    try:
        blocks.launch(
            server_name=host, server_port=port, share=False, quiet=True, show_error=True,
            prevent_thread_lock=True, ssr_mode=False, mcp_server=False, pwa=False,
            run_history=False, enable_monitoring=False, footer_links=[], allowed_paths=[],
            max_file_size=1, theme=theme, css=asset("page.css"),
            app_kwargs={"middleware": [Middleware(Gate, hosts=hosts)]},
        )  # fmt: skip
    except (OSError, OverflowError):  # gradio's own words are about gradio
        raise UserError(
            f"expected a free port of {host} from 1 to 65535, got {port}; take another --port"
        ) from None
    return blocks
