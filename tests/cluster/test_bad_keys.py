"""Bad and odd keys in requests to a running cluster: refused with advice, or stored as themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
from urllib.parse import quote

import pytest

from tests.cluster.actions import get
from tests.cluster.clusters import Cluster
from tests.cluster.refusals import accepted, listed, refused
from tests.cluster.wire import request


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "EXPLAIN"])
@pytest.mark.parametrize(
    ("raw", "code"),
    [
        ("", "key-empty"),
        ("k" * 1025, "key-too-long"),
        ("%6B" * 1025, "key-too-long"),
        ("%C3%A9" * 513, "key-too-long"),
        ("a%FFb", "key-not-utf8"),
        ("%C3", "key-not-utf8"),
        ("%ED%A0%80", "key-not-utf8"),
        ("%C0%AF", "key-not-utf8"),
        ("%F4%90%80%80", "key-not-utf8"),
        ("a%zz", "key-not-utf8"),
        ("%", "key-not-utf8"),
        ("100%", "key-not-utf8"),
        ("%4", "key-not-utf8"),
        ("%+1", "key-not-utf8"),
    ],
)  # fmt: skip
def test_a_key_that_is_empty_or_too_long_or_not_utf8_is_refused(
    cluster: Cluster, method: str, raw: str, code: str
) -> None:
    if method == "EXPLAIN":
        refused(cluster, request("GET", f"/v1/explain/{raw}"), 400, code)
    else:
        refused(cluster, request(method, f"/v1/kv/{raw}", body=b"x" if method == "PUT" else None), 400, code)


def test_a_key_too_long_says_the_limit(cluster: Cluster) -> None:
    answer = refused(cluster, request("GET", "/v1/kv/" + "k" * 1025), 400, "key-too-long")
    assert answer.json["key_bytes_max"] == 1024


@pytest.mark.parametrize("character", ["k", "é", "日", "😀"])
def test_a_key_of_1024_bytes_is_taken_however_it_is_encoded(cluster: Cluster, character: str) -> None:
    key = (character * 1024)[: 1024 // len(character.encode())]
    key += "k" * (1024 - len(key.encode()))
    encoded = "".join(f"%{byte:02x}" for byte in key.encode())
    accepted(cluster, request("PUT", f"/v1/kv/{encoded}", body=b"long"), 201, 204)
    assert accepted(cluster, request("GET", f"/v1/kv/{quote(key)}"), 200).body == b"long"
    assert key in listed(cluster, key)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("a/b", "a/b"),
        ("a%2Fb", "a/b"),
        ("/", "/"),
        ("//", "//"),
        ("a//b/", "a//b/"),
        ("a%3Fttl=1", "a?ttl=1"),
        ("a%23b", "a#b"),
        ("a%20b", "a b"),
        ("a+b", "a+b"),
        ("a%2Bb", "a+b"),
        ("%20", " "),
        (".", "."),
        ("..", ".."),
        ("../x", "../x"),
        ("a/../../b", "a/../../b"),
        ("./a/.", "./a/."),
        ("%2e%2e/x", "../x"),
        ("%F0%9F%98%80", "😀"),
        ("%00", "\0"),
        ("a%00b", "a\0b"),
        ("%0D%0AX-Evil:%201", "\r\nX-Evil: 1"),
        ("%25", "%"),
        ("%2541", "%41"),
        ("%EF%BF%BE", "\ufffe"),
        ("e%CC%81", "e\u0301"),
        ("%C3%A9", "é"),
        ("%c3%a9", "é"),
        ("a;b=c,d@e:f!$&'()*~", "a;b=c,d@e:f!$&'()*~"),
        ('"<>\\^`{|}', '"<>\\^`{|}'),
    ],
)  # fmt: skip
def test_a_key_of_odd_characters_is_stored_as_itself_and_listed(
    cluster: Cluster, prefix: str, raw: str, name: str
) -> None:
    key = prefix + name
    accepted(cluster, request("PUT", f"/v1/kv/{prefix}{raw}", body=key.encode()), 201)
    assert listed(cluster, prefix) == [key]
    for target in (f"{prefix}{raw}", quote(key, safe=""), "".join(f"%{byte:02x}" for byte in key.encode())):
        assert accepted(cluster, request("GET", f"/v1/kv/{target}"), 200).body == key.encode()
        assert accepted(cluster, request("GET", f"/v1/explain/{target}"), 200).json["key"] == key
    body = json.dumps({"ops": [{"op": "get", "key": key}]}).encode()
    assert accepted(cluster, request("POST", "/v1/batch", body=body), 200).json["results"][0]["value"] == key
    accepted(cluster, request("DELETE", f"/v1/kv/{prefix}{raw}"), 204)
    assert listed(cluster, prefix) == []


def test_an_encoded_letter_is_the_letter_and_upper_and_lower_case_differ(cluster: Cluster, prefix: str) -> None:
    accepted(cluster, request("PUT", f"/v1/kv/{prefix}A", body=b"1"), 201)
    accepted(cluster, request("PUT", f"/v1/kv/{prefix}%41", body=b"2"), 204)
    accepted(cluster, request("PUT", f"/v1/kv/{prefix}a", body=b"3"), 201)
    assert listed(cluster, prefix) == [prefix + "A", prefix + "a"]
    assert accepted(cluster, request("GET", f"/v1/kv/{prefix}A"), 200).body == b"2"


@pytest.mark.parametrize("target", ["/v1/kv/é", "/v1/kv?prefix=é", b"/v1/kv/\xff", b"/v1/kv/\x7f", b"/v1/kv/a\0b"])
def test_bytes_that_are_not_percent_encoded_are_refused_with_that_advice(cluster: Cluster, target: str | bytes) -> None:
    answer = refused(cluster, request("GET", target), 400, "bad-request")
    assert "percent-encoded" in answer.json["detail"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed: apt-get install curl")
def test_curl_reaches_keys_with_dots_and_spaces_when_they_are_encoded(cluster: Cluster, prefix: str) -> None:
    url = f"{cluster.url}/v1/kv/{prefix}"
    for target, name in (("..%2Fa", "../a"), ("a%20b", "a b"), ("é", "é")):
        subprocess.run(["curl", "-sfS", "-X", "PUT", "--data-binary", name, url + target], check=True)
        assert get(cluster, prefix + name).body == name.encode()
