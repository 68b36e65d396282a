"""Split an endpoint's URL into public and secret parts (`split_url`), and mask secrets in texts (`masked`)."""

import re
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, unquote_to_bytes, urlsplit

from lisa_lightning.runtime.errors import UserError, printable

MAX_SHARED_CHARS: Final = 7
"""Maximum number of consecutive characters that a shown text may share with a secret."""
PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class EndpointURL:
    """Parts of an endpoint's URL. Only the bare URL is ever shown."""

    bare: str
    """Scheme, host, port and path."""
    auth: tuple[bytes, bytes] | None = field(repr=False)
    """User and password of HTTP basic authentication, which then replaces the key; None without them."""
    query: tuple[tuple[str, str], ...] = field(repr=False)
    """Names and values that are sent with each request."""
    secrets: tuple[str, ...] = field(repr=False)
    """Texts of the URL that must not be shown, encoded and decoded."""


def split_url(url: str, key: str) -> EndpointURL:
    """Return the parts of an http(s) URL; a fragment is dropped.

    Args:
        url: the URL; user, password and query are optional.
        key: config key or environment variable of the URL, for the error.

    Raises:
        UserError: if the URL has another scheme, an invalid host or port, or a sign that could be part of a password.
    """
    split = _valid_split(url)
    if split is None:
        raise UserError(
            f"{key}: it is no http(s) URL with a valid host and port (its value may hold a password and is not shown). "
            f"Fix: set {key} to http(s)://HOST:PORT/PATH, without blanks. Write / ? # and @ of a password as %2F %3F "
            "%23 and %40"
        )
    host = split.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if split.port is None else f":{split.port}"
    user, _, password = split.netloc.rpartition("@")[0].partition(":")
    auth = (unquote_to_bytes(user), unquote_to_bytes(password)) if user or password else None
    query = tuple(parse_qsl(split.query, keep_blank_values=True))
    secrets = {password or user, unquote(password or user), *(value or name for name, value in query)}
    secrets |= {piece.partition("=")[2] for piece in split.query.split("&")}
    secrets |= {b64encode(b":".join(auth)).decode()} if auth else set()
    return EndpointURL(f"{split.scheme}://{host}{port}{split.path}", auth, query, tuple(sorted(secrets - {""})))


def same_server(base: Any, target: Any) -> bool:
    """Return True if a request to `target` goes to the server of `base`.

    Host and port must be equal, and https must not become http. From http to https the default ports count as equal.

    Args:
        base: the endpoint, a URL of the HTTP library.
        target: URL of the request, of the same class.
    """
    port, target_port = (url.port or PORTS.get(url.scheme) for url in (base, target))
    upgraded = (base.scheme, port, target.scheme, target_port) == ("http", 80, "https", 443)
    weaker = target.scheme != base.scheme and target.scheme != "https"
    return target.raw_host == base.raw_host and not weaker and (port == target_port or upgraded)


def without_secrets(url: Any) -> str:
    """Return a URL of the HTTP library as text, without user, password, query and fragment."""
    path = url.raw_path.partition(b"?")[0].decode("ascii", "replace")
    return f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}{path}"


def masked(text: str, secrets: Iterable[str]) -> str:
    """Return `text` with *** in place of each piece of more than 7 characters that also occurs in a secret.

    A shorter secret is masked if it occurs in full; one of up to 3 characters only as a separate word.

    Args:
        text: a text to show.
        secrets: texts that must not be shown; "" has no effect.
    """
    hidden = [False] * len(text)
    for secret in secrets:
        size = min(MAX_SHARED_CHARS + 1, len(secret))
        word = r"(?<!\w)%s(?!\w)" if size < 4 else "%s"
        pieces = {secret[i : i + size] for i in range(len(secret) - size + 1)} - {""}
        for piece in pieces:
            for match in re.finditer(f"(?={word % re.escape(piece)})", text, re.IGNORECASE):
                hidden[match.start() : match.start() + size] = [True] * size
    shown = "".join("\0" if hide else char for char, hide in zip(text, hidden, strict=True))
    return re.sub("\0+", "***", shown)


def _valid_split(url: str) -> SplitResult | None:
    """Return the split URL, None if it is not valid. Library errors are dropped since they could quote a password."""
    try:
        split = urlsplit(url)
        valid = split.scheme in PORTS and split.port != 0 and _is_host(split.hostname or "")
    except ValueError:
        return None
    # A raw slash or question mark of a password ends the host too early, and leaves an @ after it.
    ambiguous = "@" in split.path + split.query + split.fragment
    clean = printable(url) == url and not re.search(r"[\s\\]", url)
    return split if valid and clean and not ambiguous else None


def _is_host(host: str) -> bool:
    """Return True if `host` is a name or an address. Raises ValueError if it can't be encoded."""
    if ":" in host or re.fullmatch(r"[\d.]+", host):
        return bool(ip_address(host))
    return re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", host.encode("idna").decode()) is not None
