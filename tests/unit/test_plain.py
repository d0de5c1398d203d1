"""Plain trees: every value in which two differ is named."""

from memdlm.plain import as_json_gives_it, differences


def test_differences_name_every_value() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 0}) == [
        "a.c: 2 -> 3",
        "d: None -> 0",
    ]


def test_equal_trees_have_none_however_they_were_written() -> None:
    tree = {"stop": (1, 2), 3: None}
    assert differences(as_json_gives_it(tree), {"stop": [1, 2], "3": None}) == []
