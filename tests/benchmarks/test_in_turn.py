"""Variants of a benchmark in turn, with a program that writes figures in the place of one."""

import json
import sys

import pytest

from benchmarks.in_turn import Variant, main, order

CHILD = """
import json, os, sys
words = sys.argv[1:]
out = words[words.index("--out") + 1]
with open(os.environ["SEEN"], "a") as seen:
    print(os.environ.get("MODE", "plain"), *words[:-2], file=seen)
if "--fail" in words:
    sys.exit(3)
runs = sum(1 for _ in open(os.environ["SEEN"]))
step = 5.0 if "--fast" in words else 10.0
figures = [
    {"what": "step", "at": "8", "unit": "ms", "value": step + runs, "repeats": [step + runs]},
    {"what": "rate", "at": "256", "unit": "tok/s", "value": 1000.0 / step},
]
json.dump({"figures": figures}, open(out, "w"))
"""


@pytest.fixture
def seen(tmp_path, monkeypatch):
    path = tmp_path / "seen"
    monkeypatch.setenv("SEEN", str(path))
    return path


def go(tmp_path, *words):
    return main([*words, "--out", str(tmp_path / "found" / "pair"), "--", sys.executable, "-c", CHILD, "bench"])


def test_variants_run_there_and_back_and_are_compared_with_the_first(tmp_path, seen, capsys):
    assert go(tmp_path, "--variant", "old=", "--variant", "new=MODE=quick --fast", "--rounds", "2") == 0
    assert seen.read_text().splitlines() == ["plain bench", "quick bench --fast", "quick bench --fast", "plain bench"]
    document = json.loads((tmp_path / "found" / "pair.json").read_text())
    old, new = document["variants"]
    assert [old["figures"][0]["repeats"], new["figures"][0]["repeats"]] == [[11.0, 14.0], [7.0, 8.0]]
    assert new["environment"] == {"MODE": "quick"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| step | 8 | ms | 12.5 (11 to 14) | 7.5 (7 to 8) | 1.667x |"
    assert lines[3].endswith("| 2.000x |")  # of a rate more is better


def test_what_was_measured_before_a_failure_stays(tmp_path, seen):
    with pytest.raises(RuntimeError, match=r"(?s)bad: .*--fail.* ended with code 3"):
        go(tmp_path, "--variant", "good=", "--variant", "bad=--fail")
    document = json.loads((tmp_path / "found" / "pair.json").read_text())
    assert [variant["name"] for variant in document["variants"]] == ["good"]


@pytest.mark.parametrize("variants", [["only="], ["same=", "same=x"], ["no name"], ["a/b=", "c="]])
def test_what_cannot_be_compared_is_refused(tmp_path, seen, variants, capsys):
    with pytest.raises(SystemExit):
        go(tmp_path, *(word for variant in variants for word in ("--variant", variant)))
    assert "variant" in capsys.readouterr().err
    assert not seen.exists()


def test_an_empty_variant_adds_nothing_and_values_may_have_spaces_and_equals():
    assert Variant.read("plain=") == Variant("plain", (), ())
    found = Variant.read("b=FLAGS='--x=1 --y' --set a=b")
    assert found.environment == (("FLAGS", "--x=1 --y"),)
    assert found.words == ("--set", "a=b")


def test_three_variants_change_places_each_round():
    assert order(3, 3) == [0, 1, 2, 2, 1, 0, 0, 1, 2]
