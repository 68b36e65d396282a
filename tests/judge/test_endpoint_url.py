"""An endpoint's URL and key: the parts that reach the server, and those that no log, terminal or error shows."""

import logging
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.chat_server import KEY, Reply, Server, settings, told
from helpers.serving import serving
from lisa_lightning.judge.base import Pair, Verdict
from lisa_lightning.judge.openai import OpenAIJudge
from lisa_lightning.runtime.endpoint_url import masked, same_server, split_url
from lisa_lightning.runtime.errors import UserError

PAIR = Pair("request 1", "answer 1")
TEXT = st.text(st.characters(codec="utf-8"), min_size=8, max_size=20)


def judged(reply: Reply, url: str | None = None, **more: object) -> list[Verdict]:
    """Return the verdict of a judge that takes its URL from the environment if none is passed."""
    Server.reply = staticmethod(reply)
    return told(OpenAIJudge(**settings("openai", "", base_url=url, **more)).verdicts([PAIR]))


@given(user=TEXT, password=TEXT, value=TEXT)
def test_any_password_and_query_are_decoded_and_not_shown(user: str, password: str, value: str) -> None:
    first, second, third = (quote(text, safe="") for text in (user, password, value))
    url = split_url(f"https://{first}:{second}@Example.org:8443/a/v1?name={third}&name=2#end", "OPENAI_BASE_URL")
    assert url.bare == "https://example.org:8443/a/v1"
    assert url.auth == (user.encode(), password.encode())
    assert url.query == (("name", value), ("name", "2"))
    assert repr(url) == f"EndpointURL(bare='{url.bare}')"
    assert {password, value, second, third} <= set(url.secrets)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "ftp://u:SECRETPW@h/v1",
            "u:SECRETPW@h/v1",
            "//u:SECRETPW@h",
            "http:u:SECRETPW@h",
            "SECRETPW",
            "file:///SECRETPW",
        ),
        *("http://", "http://u:SECRETPW@/v1", "http://u:SECRETPW@:80/v1", "http:///SECRETPW"),
        *("http://u:SECRETPW@h:port", "http://u:SECRETPW@h:99999", "http://u:SECRETPW@h:0", "http://u:SECRETPW@h:-1"),
        *("http://u:SECRETPW@[::1", "http://u:SECRETPW@[x]", "http://u:SECRETPW@a..b", "http://u:SECRETPW@999.1.1.1"),
        *("http://u:SECRETPW/x@h", "http://u:1/SECRETPW@h", "http://u:1?SECRETPW@h", "http://u:1#SECRETPW@h"),
        *("http://u:SECRET PW@h", "http://u:SECRET\x1bPW@h", "http://u:SECRETPW\u202e@h", "http://u:SECRETPW@h\\@e"),
        *("http://u:SECRETPW℀@h", "http://u:SECRETPW@ex%41mple.org", "http://u:SECRETPW@h h/v1"),
    ],
)
def test_an_invalid_url_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(UserError, match=r"^OPENAI_BASE_URL: .*http\(s\).* Fix: ") as error:
        OpenAIJudge(**settings("openai", "", base_url=None))
    assert "SECRET" not in str(error.value) + repr(error.value.__cause__)


@pytest.mark.slow
def test_a_password_reaches_the_server_and_nothing_else(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("httpx", "httpx2", "httpcore.http11", "openai._base_client"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    logging.getLogger("openai").setLevel(logging.DEBUG)  # as OPENAI_LOG=debug does
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(
        "OPENAI_BASE_URL", f"  {url.replace('://', '://us%40r:SECRET%2FPW@')}?tok=SECRETQ%2B1&a=1&a=2#x\n"
    )
    assert judged(lambda _: (200, "Score: 3")) == [Verdict(False, 0.5)]
    assert Server.asked[0]["path"] == "/v1/chat/completions?tok=SECRETQ%2B1&a=1&a=2"
    assert Server.asked[0]["authorization"] == "Basic dXNAcjpTRUNSRVQvUFc="  # in place of the key, as by the library
    with pytest.raises(UserError, match="refuses the request") as error:
        judged(lambda _: (400, "SECRET/PW SECRET%2FPW xSECRETQ+1x dXNAcjpTRUNSRVQvUFc= sk-test-0123 secret/pw"))
    judge = OpenAIJudge(**settings("openai", "", base_url=None))
    shown = (
        str(error.value) + caplog.text + "".join(capfd.readouterr()) + repr(vars(judge)) + repr(vars(judge.endpoint))
    )
    assert not any(secret.lower() in shown.lower() for secret in ("SECRET", "tok=", "dXNAcjpT", "sk-test"))
    assert [
        record for record in caplog.records if record.name.partition(".")[0] in ("httpx2", "httpcore2", "openai")
    ] == []


@pytest.mark.parametrize("value", ["", " \n"])
def test_a_blank_url_counts_as_not_set(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", value)
    endpoint = OpenAIJudge(**settings("openai", "", base_url=None)).endpoint
    with endpoint.client.connect() as client:
        assert str(client.base_url) == "https://api.openai.com/v1/"


@given(text=st.text("abcdefgh12", max_size=60), secret=st.text("abcdefgh12", min_size=1, max_size=40))
def test_a_masked_text_shares_no_eight_characters_with_a_secret(text: str, secret: str) -> None:
    shown = masked(f"{text} {secret} {secret[:12]}", [secret])
    for piece in shown.replace("***", " ").split():
        assert not any(piece[i : i + 8] in secret for i in range(len(piece) - 7))
    assert secret not in shown.split()
    assert masked("nothing to hide", [secret]) == "nothing to hide" or len(secret) < 8


@pytest.mark.slow
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_to_another_server_is_followed(url: str, status: int) -> None:
    with serving(Server) as other:
        with pytest.raises(UserError, match=r"Fix: set judge\.openai\.base_url to .* if you trust it") as error:
            judged(lambda _: (status, other.replace("://", "://u:SECRETPW@") + "/v1/chat/completions?tok=SECRETQ"), url)
        assert [body["host"] for body in Server.asked] == [url.split("/")[2]]
    assert url in str(error.value)
    assert f"base_url to {other}/v1 if" in str(error.value)
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("wrapping", [False, True], ids=["this version of openai", "one that wraps every Exception"])
def test_a_refused_redirect_is_not_sent_again_and_costs_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch, wrapping: bool
) -> None:
    if wrapping:
        monkeypatch.setattr("openai._base_client.request_exceptions", lambda: (Exception,), raising=False)
    with serving(Server) as other:
        Server.reply = staticmethod(lambda _: (307, f"{other}/v1/chat/completions"))
        judge = OpenAIJudge(**settings("openai", url, retries=3, concurrency=1))
        with pytest.raises(UserError, match="no question is sent to another server"):
            list(judge.verdicts([PAIR, Pair("request 2", "answer 2")]))
    assert [body["host"] for body in Server.asked] == [url.split("/")[2]]
    assert (judge.endpoint.spent, judge.endpoint._reserved) == (0.0, 0.0)


def test_a_redirect_at_the_same_server_is_followed(url: str) -> None:
    replies = iter([(307, "/else/chat/completions"), (200, "Score: 3")])
    assert judged(lambda _: next(replies), url) == [Verdict(False, 0.5)]
    assert [body["path"] for body in Server.asked] == ["/v1/chat/completions", "/else/chat/completions"]


@pytest.mark.parametrize(
    ("target", "same"),
    [
        (("http", b"h", None), True),
        (("http", b"h", 80), True),
        (("https", b"h", None), True),
        (("https", b"h", 443), True),
        (("http", b"h", 81), False),
        (("https", b"h", 8443), False),
        (("http", b"h.evil", None), False),
        (("ftp", b"h", 80), False),
    ],
)
def test_what_is_the_same_server(target: tuple[str, bytes, int | None], same: bool) -> None:
    def url(scheme: str, host: bytes, port: int | None) -> SimpleNamespace:
        return SimpleNamespace(scheme=scheme, raw_host=host, port=port)

    assert same_server(url("http", b"h", None), url(*target)) == same
    assert not same_server(url("https", b"h", None), url("http", b"h", None))
    assert not same_server(url("https", b"h", 9), url("http", b"h", 9))


@pytest.mark.slow
@pytest.mark.parametrize("key", [f"{KEY}\n", f" \t{KEY}\r\n", KEY])
def test_white_space_around_a_key_is_dropped(url: str, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    judged(lambda _: (200, "Score: 3"), url)
    assert Server.asked[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "key", ["sk-SECRETé", "sk SECRET", "sk\nSECRET", "sk\x01SECRET", "\ufeffskSECRET", "skSECRET\u200b"]
)
def test_a_key_that_no_header_can_hold_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match=r"^OPENAI_API_KEY: .* Fix: ") as error:
        OpenAIJudge(**settings("openai", "http://127.0.0.1:1/v1"))
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("key", ["", " ", "\n\t"])
def test_a_blank_key_counts_as_not_set(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="the environment variable OPENAI_API_KEY is not set"):
        OpenAIJudge(**settings("openai", "http://127.0.0.1:1/v1"))


def test_no_error_or_warning_holds_control_characters(url: str, caplog: pytest.LogCaptureFixture) -> None:
    signs = "\x1b]0;t\x07 \x9b31m \u202e \u2028 \r\n"
    replies = iter([(400, f"temperature {signs}"), (404, f"no {signs} model")])
    with pytest.raises(UserError, match="knows no model m") as error:
        judged(lambda _: next(replies), url, model=f"m{signs}n")
    assert "takes no temperature" in caplog.text
    assert all(message.isprintable() for message in (str(error.value), *caplog.messages))


def test_an_environment_that_no_client_can_use_ends_in_a_sentence(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    with pytest.raises(UserError, match="the request failed"):
        judged(lambda _: (200, "Score: 3"), url)
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv("OPENAI_ORG_ID", "é")
    with pytest.raises(UserError, match="the request failed"):
        judged(lambda _: (200, "Score: 3"), url)
