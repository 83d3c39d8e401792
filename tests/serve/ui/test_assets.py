"""The page's files as served: complete, guarded by their headers, and never a path."""

import re

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from serve.ui.assets import load_assets, ui_routes


@pytest.fixture
def client():
    with TestClient(Starlette(routes=ui_routes())) as made:
        yield made


def test_the_page_and_every_file_it_names_are_there(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    named = set(re.findall(r'(?:src|href)="ui/([^"]+)"', page.text))
    assert {"app.js", "style.css", "theme.js", "icon.svg"} <= named
    imported = {
        name for asset in load_assets().values() for name in re.findall(r'from "\./([^"]+)"', asset.body.decode())
    }
    for name in named | imported:
        assert client.get(f"/ui/{name}").status_code == 200, name


def test_every_answer_forbids_what_the_page_does_not_need(client):
    for path in ("/", "/ui/app.js", "/ui/style.css"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_names_no_other_host():
    for name, asset in load_assets().items():
        hosts = set(re.findall(r"https?://[^\s\"'/)]+", asset.body.decode()))
        assert hosts <= {"http://www.w3.org"}, name  # the namespace of SVG


def test_nothing_the_page_shows_is_parsed_as_markup():
    for name, asset in load_assets().items():
        if name.endswith(".js"):
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", asset.body.decode()
            ), name


@pytest.mark.parametrize(
    "name", ["../assets.py", "..%2fassets.py", "%2e%2e/assets.py", "nothing.js", "static", "app.js%00"]
)
def test_a_name_that_is_no_file_of_the_page_is_not_found(client, name):
    assert client.get(f"/ui/{name}").status_code == 404


def test_an_unchanged_file_is_not_sent_again(client):
    first = client.get("/ui/app.js")
    again = client.get("/ui/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_page_stays_small():
    assert sum(len(asset.body) for asset in load_assets().values()) < 100_000
