"""`ServeConfig`: address, security and limits of a server; the flags of `dsmoe serve` set its fields."""

import dataclasses
import ipaddress
import re
from typing import Final

from dsmoe_jax.errors import DSMoEError

MAX_N: Final = 128  # outputs per prompt, as in the OpenAI API
_KEY: Final = re.compile(r"[!-~]([ -~]*[!-~])?")
_HOST: Final = r"([a-z0-9_.-]+|\[[0-9a-f:.]+\])"
# As browsers send it: in lower case, and without the default port.
_ORIGIN: Final = re.compile(rf"\*|(http://{_HOST}(?!:80$)|https://{_HOST}(?!:443$))(:[1-9]\d{{0,4}})?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Configuration of a server.

    Attributes:
        host: Address to bind to.
        port: Port to bind to; 0: a free one.
        model_name: Name of the model in requests and responses.
        base_name: Name of the model that an adapter was trained on, for `/v1/models`.
        api_key: Key that requests must send as a bearer token; None: none.
        allow_origins: Web origins whose pages may call the server (CORS), `http[s]://host[:port]`; `*`: all.
        max_queue: Outputs that may wait for a row of the batch; more are refused with status 429.
        max_body_bytes: Size of a request body.
        request_timeout: Seconds until a request is canceled.
        idle_timeout: Seconds until a connection without a complete request is closed.
        drain_timeout: Seconds that requests in flight may take after SIGTERM.
        parse_special_tokens: Encode special-token strings in chat messages as special tokens.

    Raises:
        DSMoEError: A value is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str = "model"
    base_name: str | None = None
    api_key: str | None = None
    allow_origins: tuple[str, ...] = ()
    max_queue: int = 1024
    max_body_bytes: int = 4 << 20
    request_timeout: float = 600.0
    idle_timeout: float = 60.0
    drain_timeout: float = 120.0
    parse_special_tokens: bool = False

    def __post_init__(self) -> None:
        """Validate the values."""
        if not 0 <= self.port < 1 << 16:
            raise DSMoEError(f"port must be in [0, 65535], got {self.port}")
        for name, minimum in (("max_queue", 0), ("max_body_bytes", 1)):
            if (value := getattr(self, name)) < minimum:
                raise DSMoEError(f"{name} must be at least {minimum}, got {value}")
        for name in ("request_timeout", "idle_timeout", "drain_timeout"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise DSMoEError(f"{name} must be a positive number of seconds, got {value}")
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):  # no header could carry it
            raise DSMoEError("api_key must be non-empty printable ASCII text without whitespace around it")
        for origin in self.allow_origins:
            if not _ORIGIN.fullmatch(origin):
                example = "an origin as browsers send it, such as https://example.com or http://localhost:3000"
                raise DSMoEError(f"allow_origins must be * or {example}, got {origin!r:.200}")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Return whether a host is `localhost` or a loopback address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
