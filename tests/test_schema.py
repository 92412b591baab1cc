"""Values of JSON and TOML files, as the types that annotations state."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from drelu_timm.errors import InputError
from drelu_timm.schema import Constraint, Count, Share, Text, dump, field_types, load, load_table, parse


@dataclass(frozen=True)
class Inner:
    share: Share
    words: tuple[Text, ...] = ()


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    count: Count = 1
    rate: float | None = None
    kind: Literal["a", "b"] = "a"
    folder: Path | None = None
    by_name: dict[str, Inner] = field(default_factory=dict)
    exact: int | float = 0
    any_value: Any = None


WHOLE = {
    "name": "x",
    "inner": {"share": 1, "words": ["p", "q"]},
    "count": 2,
    "rate": 3,
    "kind": "b",
    "folder": "data",
    "by_name": {"k": {"share": 0.5}},
    "exact": 7,
    "any_value": [1, {}],
    "of_another_version": 5,
}


def test_a_whole_file_gets_the_types_of_its_fields():
    read = load(Outer, WHOLE, "f.json")
    inner = Inner(1.0, ("p", "q"))
    assert read == Outer("x", inner, 2, 3.0, "b", Path("data"), {"k": Inner(0.5)}, 7, [1, {}])
    assert type(read.rate) is float and type(read.inner.share) is float and type(read.exact) is int


def test_what_is_dumped_is_loaded_again():
    read = load(Outer, {**WHOLE, "folder": None}, "f.json")
    assert load(Outer, json.loads(json.dumps(dump(read))), "f.json") == read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 5}, "f.json: name is 5. It must be text in quotes."),
        ({"inner": []}, "f.json: inner is []. It must be a table of names and values."),
        ({"inner": {}}, "f.json: inner has no share. The file is cut or of another version; create it again."),
        ({"inner": {"share": 1.5}}, "f.json: inner.share is 1.5. It must be a number from 0 to 1."),
        ({"inner": {"share": float("nan")}}, "f.json: inner.share is nan. It must be a number from 0 to 1."),
        ({"inner": {"share": True}}, "f.json: inner.share is True. It must be a number from 0 to 1."),
        ({"inner": {"share": 0, "words": ["p", ""]}}, "f.json: inner.words[1] is ''. It must be text in quotes, not "),
        ({"inner": {"share": 0, "words": "p"}}, "f.json: inner.words is 'p'. It must be a list."),
        ({"count": True}, "f.json: count is True. It must be a whole number above 0."),
        ({"count": 0}, "f.json: count is 0. It must be a whole number above 0."),
        ({"count": 1.0}, "f.json: count is 1.0. It must be a whole number above 0."),
        ({"rate": "3"}, "f.json: rate is '3'. It must be a number."),
        ({"rate": 10**400}, "f.json: rate is 1000"),
        ({"rate": 16**9999}, "f.json: rate is of type int. It must be a number."),
        ({"kind": "c"}, "f.json: kind is 'c'. It must be one of a, b."),
        ({"kind": []}, "f.json: kind is []. It must be text in quotes."),
        ({"folder": "a\0b"}, r"f.json: folder is 'a\x00b'. It must be a path in quotes."),
        ({"by_name": {"k": {"share": None}}}, "f.json: by_name.k.share is None. It must be a number from 0 to 1."),
        ({"exact": "1"}, "f.json: exact is '1'. It must be a whole number or a number."),
    ],
)
def test_another_value_is_named_with_file_and_field(change, message):
    with pytest.raises(InputError) as caught:
        load(Outer, WHOLE | change, "f.json")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, [], "x", 3])
def test_content_that_is_not_a_table_is_refused(content):
    with pytest.raises(InputError, match=r"f\.json is .+\. It must be a table of names and values\."):
        load(Outer, content, "f.json")
    with pytest.raises(InputError, match=r"f\.toml: \[t\] is .+\. It must be a table of names and values\."):
        load_table({}, content, "f.toml: [t]")


def test_lists_as_deep_as_a_parser_reads_are_refused_in_one_line():
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InputError, match=r"^f: x is of type list\. It must be a whole number\.$"):
        parse(int, deep, "f: x")


def test_a_table_may_lack_fields_but_have_no_others():
    types = field_types(Outer)
    assert load_table(types, {"rate": 1}, "f.toml: [t]") == {"rate": 1.0}
    with pytest.raises(InputError, match=r"f\.toml: \[t\] 'cuont' is unknown; did you mean count\?"):
        load_table(types, {"cuont": 1}, "f.toml: [t]")
    with pytest.raises(InputError, match=r"f\.toml: \[t\] count is -1\. It must be a whole number above 0\."):
        load_table(types, {"count": -1}, "f.toml: [t]")


def test_a_union_is_read_by_the_type_that_fits():
    axis = int | Annotated[tuple[int, ...], Constraint(bool, "one value, or a list of values")]
    assert parse(axis, 3, "x") == 3 and parse(axis, [3, 4], "x") == (3, 4)
    with pytest.raises(InputError, match=r"x is \[\]\. It must be one value, or a list of values\."):
        parse(axis, [], "x")
    with pytest.raises(InputError, match=r"x\[1\] is 'a'\. It must be a whole number\."):
        parse(axis, [1, "a"], "x")
