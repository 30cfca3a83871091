"""Who may connect: tokens, addresses, certificates; and that both sides say why one may not."""

import datetime
import importlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import ConfigError, PeerLost
from headrace.transport import auth, wire
from headrace.transport.auth import (
    Address,
    check_exposure,
    client_tls,
    is_loopback,
    parse_address,
    read_token,
    server_tls,
    token_fault,
    token_metadata,
)
from headrace.transport.grpc_client import HostClient
from headrace.transport.grpc_server import Listener
from headrace.transport.notices import Notices
from headrace.transport.settings import LinkConfig, RemoteConfig

HELLO = {"protocol": wire.VERSION, "name": "node7"}
TOKEN = "a-token-of-some-length"
OTHER = "another-token-as-long"

Listen = Callable[..., Listener]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    spec = importlib.util.spec_from_file_location("tenants", Path(__file__).parent / "tenants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Files(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def tools() -> Any:
    return importlib.import_module("tenants")


@pytest.fixture
def book(tools: Any) -> Any:
    return tools.Book()


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_TOKEN", raising=False)


@pytest.fixture
def listen(book: Any) -> Iterator[Listen]:
    made = []

    def listener(**config: Any) -> Listener:
        made.append(Listener(RemoteConfig(**config), book, on_message=book.said.append))
        return made[-1]

    yield listener
    for each in made:
        each.close()


@pytest.fixture
def token_file(tmp_path: Path) -> Callable[[str], str]:
    def written(token: str) -> str:
        path = tmp_path / f"token-{len(list(tmp_path.iterdir()))}"
        path.write_text(token)
        return str(path)

    return written


def enter(listener: Listener, **config: Any) -> None:
    """Comes in, and goes."""
    HostClient.open(LinkConfig(connect=listener.address, **config), HELLO).close()


# -- addresses, exposure


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", Address("127.0.0.1", 80)),
        ("[::1]:0", Address("::1", 0)),
        ("node-7.example:65535", Address("node-7.example", 65535)),
    ],
)
def test_an_address_is_taken_apart_and_put_together(text: str, address: Address) -> None:
    assert parse_address(text, flag="--connect") == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text", ["", "80", ":80", "host", "host:", "host:x", "host:65536", "::1:80", "a/b:1", "h:-1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--connect must"):
        parse_address(text, flag="--connect")


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("no.such.host.invalid", False),
    ],
)
def test_loopback_is_this_machine_alone(host: str, alone: bool) -> None:
    assert is_loopback(host) == alone


@pytest.mark.parametrize(
    ("token", "tls", "insecure", "lacks"),
    [
        (b"", False, False, "token"),
        (b"", True, False, "token"),
        (b"", False, True, "token"),
        (TOKEN.encode(), False, False, "TLS"),
        (TOKEN.encode(), True, False, ""),
        (TOKEN.encode(), False, True, ""),
    ],
)
def test_beyond_loopback_a_token_and_tls_are_needed(
    token: bytes, tls: bool, insecure: bool, lacks: str
) -> None:
    def check(host: str) -> None:
        check_exposure(
            Address(host, 5), token=token, tls=tls, insecure=insecure, tls_flags="--tls-x"
        )

    check("127.0.0.1")
    if lacks:
        with pytest.raises(ConfigError, match=f"needs (a )?{lacks}: give"):
            check("0.0.0.0")
    else:
        check("0.0.0.0")


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_neither_end_goes_beyond_loopback_unguarded(
    listen: Listen, address: str, monkeypatch: pytest.MonkeyPatch, files: Any
) -> None:
    for token, words in (("", "a token"), (TOKEN, "TLS")):
        monkeypatch.setenv("HEADRACE_TOKEN", token)
        with pytest.raises(ConfigError, match=words):
            listen(listen=address)
        with pytest.raises(ConfigError, match=words):
            HostClient.open(LinkConfig(connect=address), HELLO)


# -- tokens


def test_the_token_comes_from_the_file_or_the_environment(
    token_file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_token("") == b""
    monkeypatch.setenv("HEADRACE_TOKEN", f" {TOKEN}\n")
    assert read_token("") == TOKEN.encode()
    assert read_token(token_file(OTHER + "\n")) == OTHER.encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("fifteen-letters", "at least 16"),
        ("two words of some length", "without spaces"),
        ("umlauts-äöü-are-not-for-headers", "ASCII"),
    ],
)
def test_a_token_that_is_none_is_refused_and_not_shown(
    token_file: Callable[[str], str], content: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        read_token(token_file(content))
    assert not content or content not in str(raised.value)


def test_a_token_file_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="/no/such/file cannot be read"):
        read_token("/no/such/file")


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compare(shown: bytes, wanted: bytes) -> bool:
        asked.append((shown, wanted))
        return shown == wanted

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    token = TOKEN.encode()
    assert token_fault(token, token_metadata(token)) == ""
    assert "wrong token" in token_fault(token, token_metadata(OTHER.encode()))
    assert "no token" in token_fault(token, ())
    assert len(asked) == 3
    assert token_fault(b"", ()) == ""


@pytest.mark.net
def test_wrong_tokens_and_none_are_refused_on_both_sides(
    listen: Listen, book: Any, token_file: Callable[[str], str]
) -> None:
    listener = listen(token_file=token_file(TOKEN))
    with pytest.raises(ConfigError, match=r"refused by 127.0.0.1:.*: wrong token") as wrong:
        enter(listener, token_file=token_file(OTHER))
    with pytest.raises(ConfigError, match="no token: this server asks for one"):
        enter(listener)
    enter(listener, token_file=token_file(TOKEN))
    assert listener.counters["refused"] == 2
    assert len(book.welcomed) == 1
    assert book.says("refused 127.0.0.1:", "wrong token")
    assert book.says("refused 127.0.0.1:", "no token")
    assert not book.says(TOKEN)
    assert not book.says(OTHER)
    assert TOKEN not in str(wrong.value)


@pytest.mark.net
def test_the_token_comes_before_all_else(listen: Listen, token_file: Callable[[str], str]) -> None:
    listener = listen(token_file=token_file(TOKEN), max_hosts=1)
    with pytest.raises(ConfigError, match="no token"):
        HostClient.open(LinkConfig(connect=listener.address), {"not": "a hello"})
    inside = HostClient.open(
        LinkConfig(connect=listener.address, token_file=token_file(TOKEN)), HELLO
    )
    with pytest.raises(ConfigError, match="no token"):  # not: that it is full
        enter(listener)
    inside.close()
    assert listener.counters["messages_in"] <= 2  # hello and bye: nothing else was read


# -- certificate files


def test_files_of_both_ends_are_checked_at_the_start(files: Any, tmp_path: Path) -> None:
    old_cert, old_key = files.pair("old", "127.0.0.1", days=-1)
    begins = datetime.datetime(2100, 2, 3, 4, 5, tzinfo=datetime.UTC)
    early = files.pair("early", "127.0.0.1", days=36500, begins=begins)
    other_cert, _ = files.pair("other", "127.0.0.1")
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    binary = tmp_path / "binary.pem"
    binary.write_bytes(bytes(range(256)))
    cert, key, ca = files.cert, files.key, files.ca
    for pair, words in (
        ((cert, ""), "go together"),
        ((cert, "/no/key"), "private key /no/key cannot be read: No such file"),
        (("/no/cert", key), "certificate /no/cert cannot be read: No such file"),
        ((other_cert, key), "is not the private key of"),
        ((old_cert, old_key), "old.pem expired on 20"),
        (early, "early.pem is valid only from 2100-02-03 04:05 UTC on"),
        ((str(text), key), "text.pem holds no certificate in PEM"),
        ((str(binary), key), "binary.pem holds no certificate in PEM"),
        ((cert, str(text)), "is not the private key of"),
    ):
        with pytest.raises(ConfigError, match=words) as raised:
            server_tls(*pair, "")
        assert "\n" not in str(raised.value)
        with pytest.raises(ConfigError, match=words):
            client_tls(ca, *pair)
    for bad in (str(text), str(binary), "/no/ca", old_cert):
        with pytest.raises(ConfigError, match=Path(bad).name):
            server_tls(cert, key, bad)
        with pytest.raises(ConfigError, match=Path(bad).name):
            client_tls(bad, "", "")
    with pytest.raises(ConfigError, match="--tls-client-ca needs"):
        server_tls("", "", ca)
    with pytest.raises(ConfigError, match="need --tls-ca"):
        client_tls("", cert, key)
    assert server_tls("", "", "") is None
    assert client_tls("", "", "") is None


def test_an_old_authority_beside_a_new_one_is_no_fault(files: Any, tmp_path: Path) -> None:
    old_cert, _ = files.pair("old-too", "127.0.0.1", days=-1)
    both = tmp_path / "both.pem"
    both.write_bytes(Path(old_cert).read_bytes() + Path(files.ca).read_bytes())
    tls = client_tls(str(both), "", "")
    assert tls is not None
    assert tls.ca == both.read_bytes()


# -- TLS between two ends


@pytest.fixture
def tls(files: Any, listen: Listen, token_file: Callable[[str], str]) -> Callable[..., Listener]:
    def listener(**config: Any) -> Listener:
        settings = {"tls_cert": files.cert, "tls_key": files.key, "hello_timeout_s": 0.5}
        return listen(**(settings | config))

    return listener


@pytest.mark.net
def test_tls_with_the_right_certificates(
    tls: Callable[..., Listener], book: Any, files: Any, token_file: Callable[[str], str]
) -> None:
    token = token_file(TOKEN)
    listener = tls(token_file=token)
    enter(listener, tls_ca=files.ca, token_file=token)
    with pytest.raises(ConfigError, match="wrong token"):
        enter(listener, tls_ca=files.ca, token_file=token_file(OTHER))
    cert, key = files.pair("host", "node7")
    mutual = tls(tls_client_ca=files.ca)
    enter(mutual, tls_ca=files.ca, tls_cert=cert, tls_key=key)
    assert len(book.welcomed) == 2


@pytest.mark.net
def test_beyond_loopback_with_tls_and_a_token(
    tls: Callable[..., Listener], book: Any, files: Any, token_file: Callable[[str], str]
) -> None:
    token = token_file(TOKEN)
    listener = tls(listen="0.0.0.0:0", token_file=token)
    port = listener.address.rpartition(":")[2]
    assert listener.address == f"0.0.0.0:{port}"
    config = LinkConfig(connect=f"127.0.0.1:{port}", tls_ca=files.ca, token_file=token)
    HostClient.open(config, HELLO).close()
    assert len(book.welcomed) == 1


@pytest.mark.net
def test_plain_text_to_a_tls_port(tls: Callable[..., Listener], book: Any) -> None:
    listener = tls()
    with pytest.raises(ConfigError, match="it speaks TLS: give --tls-ca"):
        enter(listener)
    assert book.welcomed == []


@pytest.mark.net
def test_tls_to_a_plain_port(listen: Listen, book: Any, files: Any) -> None:
    listener = listen()
    with pytest.raises(ConfigError, match="it speaks plain text, not TLS"):
        enter(listener, tls_ca=files.ca)
    assert book.welcomed == []
    enter(listener)


@pytest.mark.net
def test_a_server_whose_certificate_has_expired(
    tls: Callable[..., Listener],
    book: Any,
    files: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cert, key = files.pair("worn", "127.0.0.1", days=-1)
    with pytest.raises(ConfigError, match=r"worn.pem expired on"):
        tls(tls_cert=cert, tls_key=key)
    # It was good when the server started.
    monkeypatch.setattr(auth, "_time_fault", lambda der, path: "")
    listener = tls(tls_cert=cert, tls_key=key)
    with pytest.raises(ConfigError, match="not accepted here: certificate has expired"):
        enter(listener, tls_ca=files.ca)
    assert book.welcomed == []


@pytest.mark.net
def test_a_server_that_another_authority_signed(
    tls: Callable[..., Listener], book: Any, tools: Any, tmp_path: Path
) -> None:
    stranger = tools.Files(tmp_path)
    listener = tls()
    with pytest.raises(ConfigError, match=r"not accepted here: .*(issuer|verify|signature)"):
        enter(listener, tls_ca=stranger.ca)
    assert book.welcomed == []


@pytest.mark.net
def test_a_server_by_another_name(tls: Callable[..., Listener], files: Any) -> None:
    cert, key = files.pair("elsewhere", "elsewhere.example")
    listener = tls(tls_cert=cert, tls_key=key)
    with pytest.raises(ConfigError, match=r"not accepted here: .*mismatch"):
        enter(listener, tls_ca=files.ca)


@pytest.mark.net
@pytest.mark.parametrize("shown", ["none", "expired", "a stranger's"])
def test_a_host_whose_certificate_is_not_accepted(
    tls: Callable[..., Listener],
    book: Any,
    tools: Any,
    files: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shown: str,
) -> None:
    monkeypatch.setattr(auth, "_time_fault", lambda der, path: "")
    cert, key = {
        "none": lambda: ("", ""),
        "expired": lambda: files.pair("stale", "node7", days=-1),
        "a stranger's": lambda: tools.Files(tmp_path).pair("host", "node7"),
    }[shown]()
    listener = tls(tls_client_ca=files.ca)
    with pytest.raises(ConfigError, match=r"does not accept (this|a) host.*certificate"):
        enter(listener, tls_ca=files.ca, tls_cert=cert, tls_key=key)
    assert book.welcomed == []


@pytest.mark.net
def test_a_port_where_nobody_listens_may_be_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(PeerLost, match="nobody listens there: Connection refused"):
        HostClient.open(LinkConfig(connect=f"127.0.0.1:{port}"), HELLO)


# -- lines for the user


def test_lines_are_few_and_say_how_many_were_left_out() -> None:
    said: list[str] = []
    notices = Notices(said.append, now_s=0.0)
    for number in range(30):
        notices.say(f"line {number}", now_s=1.0)
    assert said == [f"line {number}" for number in range(10)]
    notices.say("later", now_s=6.1)
    assert said[10:] == ["later (20 more such lines were left out)"]
    notices.say("soon", now_s=6.2)
    assert len(said) == 11
