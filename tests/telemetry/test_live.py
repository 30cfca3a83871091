"""The live page: who may look, what is seen, and that nobody holds anybody up."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

from headrace.errors import ConfigError
from headrace.telemetry import live
from headrace.telemetry.live import LivePage
from headrace.telemetry.live_text import without_token

PICTURE = np.arange(12, dtype=np.uint8).reshape(3, 4)


@pytest.fixture
def page() -> Iterator[LivePage]:
    with LivePage("catch <b>") as page:
        yield page


def token_of(page: LivePage) -> str:
    return parse_qs(urlsplit(page.address).query)["token"][0]


def ask(
    page: LivePage,
    path: str = "/",
    *,
    token: str | None = None,
    host: str | None = None,
    method: str = "GET",
) -> tuple[http.client.HTTPResponse, bytes]:
    """Asks once; by default as one who may."""
    token = token_of(page) if token is None else token
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
    try:
        separator = "&" if "?" in path else "?"
        connection.request(
            method,
            f"{path}{separator}token={token}" if token else path,
            headers={"Host": host or f"127.0.0.1:{page.port}"},
        )
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def raw(page: LivePage, data: bytes) -> bytes:
    """Sends bytes, and reads until the server hangs up."""
    with socket.create_connection(("127.0.0.1", page.port), timeout=30) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def threads_of_pages() -> int:
    return sum(thread.name.startswith("live page") for thread in threading.enumerate())


def test_who_has_the_token_gets_page_frame_and_numbers(page: LivePage) -> None:
    page.show(PICTURE, {"updates": 7, "last return": None, "return so far": float("nan")})
    answer, body = ask(page)
    assert (answer.status, answer.getheader("Content-Type")) == (200, "text/html; charset=utf-8")
    assert b"catch &lt;b&gt;" in body
    answer, body = ask(page, "/frame?after=0")
    assert (answer.status, answer.getheader("Content-Type")) == (200, "image/png")
    assert answer.getheader("X-Frame") == "1"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(body))), PICTURE)
    answer, body = ask(page, "/state")
    assert json.loads(body) == {"updates": 7, "last return": None, "return so far": None}
    assert ask(page, "/other")[0].status == 404


def test_localhost_is_this_machine_too(page: LivePage) -> None:
    assert ask(page, host=f"localhost:{page.port}")[0].status == 200


@pytest.mark.parametrize("path", ["/", "/frame", "/state", "/other"])
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "localhost", "127.0.0.1:1"]
)
def test_a_foreign_host_is_refused(page: LivePage, path: str, host: str) -> None:
    page.show(PICTURE, {})
    answer, body = ask(page, path, host=host.format(port=page.port))
    assert (answer.status, body) == (403, b"403 Forbidden\n")


@pytest.mark.parametrize("hosts", [[], ["127.0.0.1:{port}", "evil.example"]])
def test_no_host_or_two_are_refused(page: LivePage, hosts: list[str]) -> None:
    lines = [f"GET /?token={token_of(page)} HTTP/1.1"]
    lines += [f"Host: {host.format(port=page.port)}" for host in hosts]
    assert raw(page, "\r\n".join([*lines, "", ""]).encode()).startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize("path", ["/", "/frame", "/state", "/other"])
@pytest.mark.parametrize("token", ["", "wrong", "%C3%A9%FF"])
def test_a_missing_or_wrong_token_is_refused(page: LivePage, path: str, token: str) -> None:
    page.show(PICTURE, {})
    answer, body = ask(page, path, token=token)
    assert (answer.status, body) == (403, b"403 Forbidden\n")


def test_a_token_must_be_whole_and_the_only_one(page: LivePage) -> None:
    token = token_of(page)
    assert len(token) >= 20
    for wrong in (token[:-1], token + "x", f"{token}&token={token}", f"{token}&token=x"):
        assert ask(page, token=wrong)[0].status == 403


def test_each_page_has_a_token_of_its_own(page: LivePage) -> None:
    with LivePage("other") as other:
        assert token_of(other) != token_of(page)
        assert ask(other, token=token_of(page))[0].status == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"])
def test_other_methods_are_refused(page: LivePage, method: str) -> None:
    answer, body = ask(page, method=method)
    assert (answer.status, answer.getheader("Allow")) == (405, "GET")
    assert body == (b"" if method == "HEAD" else b"405 Method Not Allowed\n")


def test_a_request_cannot_carry_another(page: LivePage) -> None:
    inner = f"GET /state?token={token_of(page)} HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\n\r\n"
    outer = inner.replace("\r\n\r\n", f"\r\nContent-Length: {len(inner)}\r\n\r\n")
    answer = raw(page, (outer + inner).encode())
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "line", ["nonsense", "GET", "GET /", "GET / HTTP/9.9", "GET http://[ HTTP/1.1"]
)
def test_nonsense_is_refused_without_an_echo(
    page: LivePage, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = raw(page, f"{line}\r\nHost: 127.0.0.1:{page.port}\r\nX-Echo: zebra\r\n\r\n".encode())
    assert b" 200 " not in answer
    assert b"zebra" not in answer
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("token", [None, "wrong"])
def test_every_answer_forbids_to_keep_guess_frame_or_share(
    page: LivePage, token: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    answer, _ = ask(page, token=token)
    assert answer.getheader("Cache-Control") == "no-store"
    assert answer.getheader("X-Content-Type-Options") == "nosniff"
    assert answer.getheader("Referrer-Policy") == "no-referrer"
    policy = answer.getheader("Content-Security-Policy") or ""
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert not [name for name, _ in answer.getheaders() if name.lower().startswith("access-contr")]
    assert capfd.readouterr() == ("", "")  # a log would have the token in it


def test_the_newest_frame_wins(page: LivePage) -> None:
    for brightness in (10, 20, 30):
        page.show(np.full((3, 4), brightness, np.uint8), {"n": brightness})
    answer, body = ask(page, "/frame?after=1")
    assert answer.getheader("X-Frame") == "3"
    assert (np.asarray(Image.open(io.BytesIO(body))) == 30).all()
    assert json.loads(ask(page, "/state")[1]) == {"n": 30}
    # One who has seen frames of an earlier page is not kept waiting for their number.
    assert ask(page, "/frame?after=999")[0].getheader("X-Frame") == "3"


def test_who_has_seen_the_newest_waits_for_the_next(
    page: LivePage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_FRAME_WAIT_S", 30.0)
    page.show(PICTURE, {})
    got: list[str | None] = []
    looker = threading.Thread(
        target=lambda: got.append(ask(page, "/frame?after=1")[0].getheader("X-Frame"))
    )
    looker.start()
    page.show(PICTURE, {})
    looker.join(20)
    assert got == ["2"]


def test_where_nothing_is_new_the_answer_is_empty(
    page: LivePage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_FRAME_WAIT_S", 0.01)
    assert ask(page, "/frame?after=0")[0].status == 204
    page.show(PICTURE, {})
    assert ask(page, "/frame?after=1")[0].status == 204


def test_a_large_picture_is_a_jpeg(page: LivePage) -> None:
    page.show(np.full((480, 480, 3), (200, 100, 50), np.uint8), {})
    answer, body = ask(page, "/frame")
    assert answer.getheader("Content-Type") == "image/jpeg"
    pixel = np.asarray(Image.open(io.BytesIO(body)))[240, 240]
    assert np.abs(pixel.astype(int) - (200, 100, 50)).max() < 8


def test_only_who_asks_for_frames_watches(page: LivePage) -> None:
    page.show(PICTURE, {})
    ask(page)
    ask(page, "/state")
    ask(page, "/frame", token="wrong")
    assert not page.watched(1000.0)
    ask(page, "/frame")
    assert page.watched(1000.0)
    assert not page.watched(0.0)


def test_a_connection_serves_many_requests(page: LivePage) -> None:
    page.show(PICTURE, {})
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
    ports = set()
    for path in ("/frame", "/state", "/"):
        connection.request("GET", f"{path}?token={token_of(page)}")
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
        ports.add(connection.sock.getsockname()[1])
    connection.close()
    assert len(ports) == 1


def test_it_listens_at_this_machine_alone(page: LivePage) -> None:
    assert page._server.socket.getsockname() == ("127.0.0.1", page.port)
    # The whole of 127/8 is this machine; a server at all addresses would answer here.
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", page.port), timeout=10).close()


def test_one_who_never_reads_holds_nobody_up(page: LivePage) -> None:
    large = np.random.default_rng(0).integers(0, 255, (1500, 1500, 3), np.uint8)
    page.show(large, {"n": 1})
    one = f"GET /frame?token={token_of(page)} HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", page.port), timeout=30) as mute:
        mute.sendall(one.encode() * 40)  # more than any buffer of the system takes
        mute.recv(1)  # its answer is under way, and will not be read on
        for n in range(2, 50):
            page.show(PICTURE, {"n": n})
        answer, _ = ask(page, "/frame")
        assert answer.getheader("X-Frame") == "49"
        page.close()
    assert threads_of_pages() == 0


def test_connections_are_bounded_and_their_places_come_back(
    page: LivePage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_MOST_CONNECTIONS", 2)
    page.show(PICTURE, {})
    two = [http.client.HTTPConnection("127.0.0.1", page.port, timeout=30) for _ in range(2)]
    for connection in two:
        connection.request("GET", f"/state?token={token_of(page)}")
        connection.getresponse().read()
    with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
        ask(page)
    assert threads_of_pages() == 1 + 2
    held = list(page._server._connections.values())
    for connection in two:
        connection.close()
    for thread in held:
        thread.join(20)
    assert ask(page)[0].status == 200


def test_a_silent_connection_is_closed(page: LivePage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live._Handler, "timeout", 0.05)
    with socket.create_connection(("127.0.0.1", page.port), timeout=30) as silent:
        assert silent.recv(1) == b""


def test_close_frees_the_port_and_ends_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_FRAME_WAIT_S", 60.0)
    before = threads_of_pages()
    page = LivePage("catch")
    silent = socket.create_connection(("127.0.0.1", page.port), timeout=30)
    waiting = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
    waiting.request("GET", f"/frame?token={token_of(page)}")
    page.close()
    page.close()
    assert threads_of_pages() == before
    waiting.close()
    silent.close()
    with LivePage("catch", page.port) as again:
        assert ask(again)[0].status == 200


def test_a_port_that_is_taken_is_a_mistake_of_the_user(page: LivePage) -> None:
    with pytest.raises(ConfigError, match=rf"port {page.port} .*--watch-port"):
        LivePage("catch", page.port)


def test_a_log_has_no_tokens(page: LivePage) -> None:
    text = without_token(f"watch the agent at {page.address}")
    assert text == f"watch the agent at http://127.0.0.1:{page.port}/?token=..."
    assert without_token("37 token") == "37 token"
