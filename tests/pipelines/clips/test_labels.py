"""Labels as text: commas that separate, and commas in names."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from names import CLASSES

from ssast.pipelines.clips.columns import TableFormat
from ssast.pipelines.clips.labels import format_labels, parse_labels
from ssast.pipelines.clips.manifest import read_manifest

SPEECH = "Male speech, man speaking"


@pytest.mark.parametrize(
    ("given_labels", "separator", "lists", "expected"),
    [
        ("a, b ,,c", ",", True, ("a", "b", "c")),
        (SPEECH, None, False, (SPEECH,)),
        ("", ",", True, ()),
        (" ", None, False, ()),
        (" , ", ",", True, ()),
        ([], ",", True, ()),
        ([SPEECH, " a"], ",", True, (SPEECH, " a")),
        ([SPEECH], None, False, (SPEECH,)),
        (f'["{SPEECH}", "a"]', ",", True, (SPEECH, "a")),
        ("[noise],[laughter]", ",", True, ("[noise]", "[laughter]")),
        ('["a"]', None, False, ('["a"]',)),
        ("a, b; c", ";", True, ("a, b", "c")),
        ("a, b", None, True, ("a, b",)),
        ('["a, b", "c"]', None, True, ("a, b", "c")),
        ("[]", None, True, ()),
        ("[3, 5]", None, True, ("3", "5")),
        ("['a, b', 'c']", None, True, ("a, b", "c")),
        (r"""['it\'s', "a'b" , 'c']""", ",", True, ("it's", "a'b", "c")),
        ("['a' 'b']", None, True, ("['a' 'b']",)),
        (f'["{SPEECH}", "a\udce9"]', ",", True, (SPEECH, "a\udce9")),
        ("['a, b', 'a\udce9']", ",", True, ("a, b", "a\udce9")),
        ("[noise]", None, True, ("[noise]",)),
        ("[[1]]", None, True, ("[[1]]",)),
        (7, None, False, ("7",)),
        ([7, "a"], None, False, ("7", "a")),
    ],
)
def test_labels(
    given_labels: Any, separator: str | None, lists: bool, expected: tuple[str, ...]
) -> None:
    assert parse_labels(given_labels, separator=separator, lists=lists) == expected


def test_known_names_are_found_whole_the_longest_first() -> None:
    classes = {SPEECH, "Male speech", "Dog", "a,b", "a,b,c"}
    assert parse_labels(f"Dog, {SPEECH},Male speech", classes=classes) == (
        *("Dog", SPEECH, "Male speech"),
    )
    assert parse_labels("a,b,c,a,b,x", classes=classes) == ("a,b,c", "a,b", "x")


@pytest.mark.parametrize(
    "wrong", [True, 7.0, 2**70, None, {"a": 1}, ["a", 7.0], [""], [" "], ["a\0"], ["\ud800"]]
)
def test_what_is_no_label(wrong: Any) -> None:
    with pytest.raises(ValueError, match="expected labels: text, a whole number, or a list"):
        parse_labels(wrong)


@given(st.lists(CLASSES, max_size=4), st.sets(CLASSES, max_size=3))
def test_text_gives_the_labels_back(names: list[str], others: set[str]) -> None:
    for separator in (",", ";", None):
        for classes in ((), others | set(names), {*names, (separator or "").join(names)}):
            text = format_labels(names, classes, separator)
            assert parse_labels(text, separator=separator, classes=classes) == tuple(names)


@pytest.mark.parametrize(
    ("header", "cell", "expected", "warned"),
    [
        ("label", f'"{SPEECH}"', (SPEECH,), None),
        ("labels", f'"{SPEECH}"', (SPEECH,), None),
        ("labels", '"cat,dog"', ("cat,dog",), "data.label_separator=',' reads several"),
        ("label", "dog;dog", ("dog;dog",), "data.label_separator=';' reads several"),
        ("label", '"cat,dog"', ("cat,dog",), "read as one label"),
        ("label", '"dog, dog"', ("dog, dog",), "read as one label"),
        ("labels", f'"[""{SPEECH}"", ""a""]"', (SPEECH, "a"), None),
        ("labels", "\"['a', 'b']\"", ("a", "b"), None),
        ("labels", "['a' 'b']", ("['a' 'b']",), "not read as a list: those in a column 'labels'"),
        ("label", "['a']", ("['a']",), "not read as a list"),
        ("label", "[noise]", ("[noise]",), None),
    ],
)
def test_commas_in_a_cell_are_never_taken_in_silence(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    header: str,
    cell: str,
    expected: tuple[str, ...],
    warned: str | None,
) -> None:
    path = tmp_path / "m.csv"
    path.write_text(f"wav,{header}\na.wav,{cell}\nb.wav,dog\nc.wav,\n")
    with caplog.at_level(logging.WARNING):
        assert read_manifest(path).labels == (expected, ("dog",), ())
    assert len(caplog.records) == (warned is not None)
    if warned:
        assert warned in caplog.text and f"{path}: 1 of 3 clips: " in caplog.text


def test_known_classes_decide_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.csv"
    path.write_text(f'wav,labels\na.wav,"Dog,{SPEECH}"\nb.wav,"{SPEECH}"\n')
    table = TableFormat(label_separator=",")
    found = read_manifest(path, {SPEECH, "Dog"}, table)
    assert found.labels == (("Dog", SPEECH), (SPEECH,))
    assert not caplog.records


def test_commas_separate_labels_in_the_published_json(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [{"wav": "a.wav", "labels": SPEECH}, {"wav": "b.wav", "labels": "Dog,Cat"}]
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"data": entries}))
    assert read_manifest(path).labels == (("Male speech", "man speaking"), ("Dog", "Cat"))
    assert "1 of 2 clips: " in caplog.text and "read as 2 labels" in caplog.text
    assert read_manifest(path, {SPEECH, "Dog", "Cat"}).labels == ((SPEECH,), ("Dog", "Cat"))
    path.write_text(json.dumps(entries))
    assert read_manifest(path).labels == ((SPEECH,), ("Dog,Cat",))
