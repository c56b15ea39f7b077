"""Web pages may ask from a browser where the operator lets them, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pdlab.core.types import UsageError
from pdlab.real.api.app import ROUTES
from pdlab.real.api.cors import Cors, cors_of
from tests.support.api_world import served

PAGE = "https://page.example"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.fixture(scope="module")
def open_to_page(folder: Path) -> Iterator[httpx.Client]:
    with served(folder, cors=Cors((PAGE,)), api_key="k") as world, httpx.Client(base_url=world.url) as http:
        yield http


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize"])
def test_a_page_that_may_is_told_so_before_it_asks(open_to_page: httpx.Client, path: str) -> None:
    answer = open_to_page.options(path, headers={"Origin": PAGE, **PREFLIGHT})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"]


def test_another_page_is_not(open_to_page: httpx.Client) -> None:
    refused = open_to_page.options("/v1/completions", headers={"Origin": "https://evil.example", **PREFLIGHT})
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize(
    ("fields", "key", "status"),
    [({"max_tokens": 2}, "k", 200), ({"max_tokens": 2, "stream": True}, "k", 200), ({"max_tokens": -1}, "k", 400), ({}, "no", 401)],
)
def test_answers_of_every_kind_may_be_read(open_to_page: httpx.Client, fields: dict[str, Any], key: str, status: int) -> None:
    headers = {"Origin": PAGE, "Authorization": f"Bearer {key}"}
    answer = open_to_page.post("/v1/completions", json={"prompt": "ab", **fields}, headers=headers)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]


def test_without_the_option_nobody_may(http: httpx.Client) -> None:
    answer = http.options("/v1/completions", headers={"Origin": PAGE, **PREFLIGHT})
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in http.get("/v1/models", headers={"Origin": PAGE}).headers


def test_all_pages_with_what_they_may_do(folder: Path) -> None:
    cors = cors_of("*", "GET, POST", '["X-Mine"]', credentials=True)
    with served(folder, cors=cors) as world:
        answer = httpx.options(f"{world.url}/v1/models", headers={"Origin": PAGE, "Access-Control-Request-Method": "GET"})
        assert answer.headers["access-control-allow-methods"] == "GET, POST"
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert "X-Mine" in answer.headers["access-control-allow-headers"]
        refused = httpx.options(f"{world.url}/v1/models", headers={"Origin": PAGE, "Access-Control-Request-Method": "DELETE"})
        assert refused.status_code == 400


def test_origins_from_the_command_line() -> None:
    assert cors_of("", "*", "*", credentials=False) == Cors()
    assert cors_of("http://a, https://b:3000", "*", "*", credentials=False).allowed_origins == ("http://a", "https://b:3000")
    assert cors_of('["*"]', "*", "*", credentials=False).allowed_origins == ("*",)


@pytest.mark.parametrize(
    ("origins", "says"),
    [
        ("page.example", "an origin is like"),
        ("https://a/b", "no path"),
        ("https://a/", "no path"),
        ("[1]", "JSON list"),
        ("[", "JSON list"),
    ],
)
def test_what_is_no_origin_is_a_mistake(origins: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        cors_of(origins, "*", "*", credentials=False)


def test_credentials_without_origins_are_a_mistake() -> None:
    with pytest.raises(UsageError, match="--allow-credentials needs --allowed-origins"):
        cors_of("", "*", "*", credentials=True)


PLAIN_TYPES = (
    None,
    "text/plain;charset=UTF-8",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/jsonp",
)


@pytest.mark.parametrize("kind", PLAIN_TYPES)
@pytest.mark.parametrize("path", [path for method, path, _ in ROUTES if method == "POST"])
def test_what_a_page_may_send_without_asking_is_refused(open_to_page: httpx.Client, path: str, kind: str | None) -> None:
    headers = {"Origin": "https://evil.example", "Authorization": "Bearer k"} | ({"Content-Type": kind} if kind else {})
    answer = open_to_page.post(path, content='{"prompt": "ab", "max_tokens": 1}', headers=headers)
    assert answer.status_code == 415
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "unsupported_media_type")
    assert "application/json" in error["message"]


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/json;x"])
def test_json_by_any_of_its_names_is_taken(open_to_page: httpx.Client, kind: str) -> None:
    headers = {"Authorization": "Bearer k", "Content-Type": kind}
    answer = open_to_page.post("/v1/completions", content='{"prompt": "ab", "max_tokens": 1}', headers=headers)
    assert answer.status_code == 200
