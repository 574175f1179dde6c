"""A key is declared in one line, and what it declares is held: on a config made up here."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from gradmix.ssl.checks import check_values
from gradmix.ssl.keys import Key, as_typed, key, key_of, keys_of


@dataclass
class Oven:
    degrees: float = key(180.0, "of the air", at_least=0, at_most=250)
    fan: str = key("off", "moves the air", choices=("off", "on"))
    racks: list[int] = key([1], "where something lies", at_least=1)


@dataclass
class Bakery:
    loaves: int = key(10, "of one day", at_least=1)
    salt: float = key(0.02, "share of the flour", above=0, because="bread without is bland")
    hours: tuple[float, float] = key((6.0, 18.0), "from and to", at_least=0, at_most=24)
    wait: tuple[float, float] = key((0.5, 2.0), "shortest and longest", above=0)
    flour: str = key("rye", "of the dough", choices=("rye", "wheat", "spelt"))
    recipe: str | None = key(None, "file with the dough", path=True, role="data")
    seats: int = key(4, "for guests", free=True)
    oven: Oven = field(default_factory=Oven)
    extras: dict[str, Any] = key({}, "anything else", free=True, role="unit", entries={"seeds": Key(at_least=0)})


def test_keys_are_found_by_their_full_names_in_order():
    names = ["loaves", "salt", "hours", "wait", "flour", "recipe", "seats", "oven.degrees", "oven.fan", "oven.racks"]
    assert list(keys_of(Bakery)) == [*names, "extras"]
    assert keys_of(Bakery)["oven.degrees"].meaning == "of the air"
    assert key_of(Bakery, "extras.nuts.black") is keys_of(Bakery)["extras"]
    assert key_of(Bakery, "extras.seeds") is keys_of(Bakery)["extras"].entries["seeds"]
    with pytest.raises(KeyError, match="ovens"):
        key_of(Bakery, "ovens.degrees")


def test_what_is_not_said_has_a_default():
    found = keys_of(Bakery)
    assert [name for name, about in found.items() if about.path] == ["recipe"]
    assert [name for name, about in found.items() if about.free] == ["seats", "extras"]
    roles = {name: about.role for name, about in found.items() if about.role != "setting"}
    assert roles == {"recipe": "data", "seats": "none", "extras": "unit"}


def test_every_config_has_lists_and_dicts_of_its_own():
    first, second = Bakery(), Bakery()
    first.extras["seeds"], first.oven.racks[0] = 3, 2
    assert (second.extras, second.oven.racks) == ({}, [1])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("loaves", "at least 1"),
        ("salt", "a number above 0, for bread without is bland"),
        ("hours", "[LOW,HIGH] with 0 <= LOW <= HIGH <= 24"),
        ("wait", "[LOW,HIGH] with 0 < LOW <= HIGH"),
        ("flour", "one of rye, wheat, spelt"),
        ("oven.degrees", "0 to 250"),
        ("oven.fan", "off or on"),
        ("seats", ""),
    ],
)
def test_the_values_of_a_key_in_words(name, values):
    assert keys_of(Bakery)[name].values == values


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loaves", 0, "loaves: expected at least 1, got 0"),
        ("loaves", float("inf"), "loaves: expected a finite number, got inf"),
        ("salt", 0.0, "salt: expected a number above 0, for bread without is bland, got 0.0"),
        ("salt", float("nan"), "salt: expected a number above 0, for bread without is bland, got nan"),
        ("hours", [6.0], "hours: expected [LOW,HIGH] with 0 <= LOW <= HIGH <= 24, got [6.0]"),
        ("hours", (6.0, 25.0), "hours: expected [LOW,HIGH] with 0 <= LOW <= HIGH <= 24, got (6.0, 25.0)"),
        ("hours", [18.0, 6.0], "hours: expected [LOW,HIGH]"),
        ("wait", (0.0, 1.0), "wait: expected [LOW,HIGH] with 0 < LOW <= HIGH, got (0.0, 1.0)"),
        ("wait", (1.0, float("inf")), "wait: expected finite numbers, got (1.0, inf)"),
        ("flour", "corn", "flour: expected one of rye, wheat, spelt, got 'corn'"),
        ("flour", None, "flour: expected one of rye, wheat, spelt, got None"),
        ("oven.degrees", 250.5, "oven.degrees: expected 0 to 250, got 250.5"),
        ("oven.fan", "broken", "oven.fan: expected off or on, got 'broken'"),
        ("oven.racks", [1, 0], "oven.racks: expected at least 1, got 0"),
        ("extras", {"seeds": -1, "nuts": -1}, "extras.seeds: expected at least 0, got -1"),
    ],
)
def test_other_values_are_refused(name, value, message):
    config = Bakery()
    group, _, last = name.rpartition(".")
    setattr(config.oven if group else config, last, value)
    with pytest.raises(ValueError) as error:
        check_values(config)
    assert str(error.value).startswith(message)


def test_a_part_of_a_config_is_named_in_full():
    with pytest.raises(ValueError, match=r"^oven\.degrees: expected 0 to 250, got -1$"):
        check_values(Oven(degrees=-1), "oven.")


def test_null_has_no_bounds_and_a_list_may_be_empty():
    check_values(Bakery(loaves=None, oven=Oven(racks=[])))


def test_a_field_that_is_no_key_says_how_to_make_it_one():
    @dataclass
    class Forgotten:
        seats: int = 4

    with pytest.raises(TypeError, match=r"Forgotten\.seats: say what it means, seats: TYPE = key\(DEFAULT, MEANING\)"):
        keys_of(Forgotten)


def test_values_as_one_types_them():
    assert as_typed([None, True, (0.5, "a"), 3]) == "[null,true,[0.5,a],3]"
