"""Split an endpoint's URL into what may be shown and what only its client may see, and mask secrets in texts."""

import re
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, unquote_to_bytes, urlsplit

from lisa_lightning.runtime.errors import UserError, printable

SHOWN_RUN: Final = 7  # characters in a row that a quoted text may share with a secret
PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class EndpointURL:
    """The parts of an endpoint's URL; only the bare URL is ever shown."""

    bare: str
    """Scheme, host, port and path."""
    auth: tuple[bytes, bytes] | None = field(repr=False)
    """User and password of HTTP basic authentication, which then takes the place of the key."""
    query: tuple[tuple[str, str], ...] = field(repr=False)
    """Names and values that go with each request."""
    secrets: tuple[str, ...] = field(repr=False)
    """Texts out of the URL that must not be shown, encoded and decoded."""


def split_url(url: str, key: str) -> EndpointURL:
    """Return the parts of an http(s) URL; a fragment is dropped.

    Args:
        url: the URL, perhaps with user, password and query.
        key: the key of the config or the environment variable that holds the URL, for the error.

    Raises:
        UserError: the URL has another scheme, no valid host or port, or a sign that could be part of a password.
    """
    parts = _split(url)
    if parts is None:
        raise UserError(
            f"{key}: it is no http(s) URL with a valid host and port (its value may hold a password and is not shown). "
            f"Fix: set {key} to http(s)://HOST:PORT/PATH, without blanks. Write / ? # and @ of a password as %2F %3F "
            "%23 and %40"
        )
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port is None else f":{parts.port}"
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    auth = (unquote_to_bytes(user), unquote_to_bytes(password)) if user or password else None
    query = tuple(parse_qsl(parts.query, keep_blank_values=True))
    hidden = {password or user, unquote(password or user), *(value or name for name, value in query)}
    hidden |= {piece.partition("=")[2] for piece in parts.query.split("&")}
    hidden |= {b64encode(b":".join(auth)).decode()} if auth else set()
    return EndpointURL(f"{parts.scheme}://{host}{port}{parts.path}", auth, query, tuple(sorted(hidden - {""})))


def same_server(base: Any, target: Any) -> bool:
    """Return whether a request to `target` stays at the server of `base`; both are URLs of the HTTP library.

    Host and port must be equal, and https must not become http. From http to https the default ports count as equal.
    """
    port, target_port = (url.port or PORTS.get(url.scheme) for url in (base, target))
    upgraded = (base.scheme, port, target.scheme, target_port) == ("http", 80, "https", 443)
    weaker = target.scheme != base.scheme and target.scheme != "https"
    return target.raw_host == base.raw_host and not weaker and (port == target_port or upgraded)


def without_secrets(url: Any) -> str:
    """Return a URL of the HTTP library without user, password, query and fragment."""
    path = url.raw_path.partition(b"?")[0].decode("ascii", "replace")
    return f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}{path}"


def masked(text: str, secrets: Iterable[str]) -> str:
    """Return `text` with *** in place of each piece of more than 7 characters that a secret holds too.

    A shorter secret is masked wherever it occurs whole; one of up to 3 characters only as a word of its own.
    """
    hidden = [False] * len(text)
    for secret in secrets:
        size = min(SHOWN_RUN + 1, len(secret))
        word = r"(?<!\w)%s(?!\w)" if size < 4 else "%s"
        pieces = {secret[i : i + size] for i in range(len(secret) - size + 1)} - {""}
        for piece in pieces:
            for match in re.finditer(f"(?={word % re.escape(piece)})", text, re.IGNORECASE):
                hidden[match.start() : match.start() + size] = [True] * size
    shown = "".join("\0" if hide else char for char, hide in zip(text, hidden, strict=True))
    return re.sub("\0+", "***", shown)


def _split(url: str) -> SplitResult | None:
    """Return the parts of a URL, None where it is not valid; errors of the library could quote a password."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in PORTS and parts.port != 0 and _is_host(parts.hostname or "")
    except ValueError:
        return None
    # A raw slash or question mark of a password ends the host too early, and an @ is left after it.
    ambiguous = "@" in parts.path + parts.query + parts.fragment
    clean = printable(url) == url and not re.search(r"[\s\\]", url)
    return parts if valid and clean and not ambiguous else None


def _is_host(host: str) -> bool:
    """Return whether `host` is a name or an address; raise ValueError where it can't be encoded."""
    if ":" in host or re.fullmatch(r"[\d.]+", host):
        return bool(ip_address(host))
    return re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", host.encode("idna").decode()) is not None
