from __future__ import annotations

import dataclasses
from itertools import product

import pytest

from sglang_musa_ext import envs
from sglang_musa_ext.envs import Settings, SettingsError

DEFAULTS = {
    "mode": "auto",
    "kernels": "auto",
    "mla_workspace_mb": 1,
    "check": "off",
    "raw_prefill": True,
    "plans": "auto",
    "force_update_metadata": False,
    "platform": "",
}
FIELDS = {
    "SGLANG_MUSA_EXT": "mode",
    "SGLANG_MUSA_EXT_KERNELS": "kernels",
    "SGLANG_MUSA_EXT_MLA_WORKSPACE_MB": "mla_workspace_mb",
    "SGLANG_MUSA_EXT_CHECK": "check",
    "SGLANG_MUSA_EXT_RAW_PREFILL": "raw_prefill",
    "SGLANG_MUSA_EXT_PLANS": "plans",
    "SGLANG_MUSA_FA3_FORCE_UPDATE_METADATA": "force_update_metadata",
}
CHOICES = {
    "SGLANG_MUSA_EXT": ("auto", "on", "off"),
    "SGLANG_MUSA_EXT_KERNELS": ("auto", "mate", "hopper", "reference"),
    "SGLANG_MUSA_EXT_CHECK": ("off", "metadata", "output"),
    "SGLANG_MUSA_EXT_PLANS": ("auto", "always"),
}
RAW = "SGLANG_MUSA_EXT_RAW_PREFILL"
FLAG = "SGLANG_MUSA_FA3_FORCE_UPDATE_METADATA"
SIZE = "SGLANG_MUSA_EXT_MLA_WORKSPACE_MB"
WHOLE_NUMBER = ("a whole number of MiB from 1 up",)
TRUE, FALSE = ("1", "true", "yes", "y"), ("0", "false", "no", "n")

GOOD_CHOICES = [
    (variable, choice, choice) for variable, choices in CHOICES.items() for choice in choices
]
BAD_CHOICES = [
    (variable, bad, choices)
    for variable, choices in CHOICES.items()
    for bad in ("nonsense", "on,off", "1", "offf")
]
GOOD = [
    *GOOD_CHOICES,
    ("SGLANG_MUSA_EXT", "OFF", "off"),
    ("SGLANG_MUSA_EXT_KERNELS", "Reference", "reference"),
    ("SGLANG_MUSA_EXT_CHECK", " metadata\n", "metadata"),
    ("SGLANG_MUSA_EXT_CHECK", " Output:0.01", "output:0.01"),
    *product([FLAG], (*TRUE, "True", " YES "), [True]),
    *product([FLAG], (*FALSE, "False", " NO "), [False]),
    (RAW, "on", True),
    (RAW, " OFF", False),
    (SIZE, "1", 1),
    (SIZE, "128", 128),
    (SIZE, " 007 ", 7),
]
BAD = [
    *BAD_CHOICES,
    ("SGLANG_MUSA_EXT", "true", CHOICES["SGLANG_MUSA_EXT"]),
    *product([RAW], ("1", "true", "nonsense"), [("on", "off")]),
    *product([FLAG], ("maybe", "2", "-1", "on", "off"), [(*TRUE, *FALSE)]),
    *product([SIZE], ("0", "-1", "1.5", "1e3", "1 MB", "0x10", "²", "٣"), [WHOLE_NUMBER]),
]


@pytest.mark.parametrize(("variable", "field"), FIELDS.items())
@pytest.mark.parametrize("value", [None, "", "  \t"])
def test_unset_or_empty_means_the_default(variable: str, field: str, value: str | None) -> None:
    """A variable that is unset, empty or blank leaves every setting at its default."""
    settings = Settings.from_environ({} if value is None else {variable: value})
    assert dataclasses.asdict(settings) == DEFAULTS
    assert field in DEFAULTS


@pytest.mark.parametrize(("variable", "value", "expected"), GOOD)
def test_a_good_value_sets_its_field_alone(variable: str, value: str, expected: object) -> None:
    """Every accepted spelling, in any case and with blanks around it, sets its own field."""
    settings = Settings.from_environ({variable: value})
    assert dataclasses.asdict(settings) == {**DEFAULTS, FIELDS[variable]: expected}


@pytest.mark.parametrize(("variable", "value", "choices"), BAD)
def test_a_bad_value_names_variable_value_and_choices(
    variable: str, value: str, choices: tuple[str, ...]
) -> None:
    """The error says which variable holds which value, and what it could be instead."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({variable: value})
    error = caught.value
    assert (error.variable, error.value) == (variable, value)
    assert all(text in str(error) for text in (variable, repr(value), *choices))
    assert all(choice in error.remedy for choice in choices)


@pytest.mark.parametrize("variable", [x for x in FIELDS if x != envs.MODE])
def test_off_means_off(variable: str) -> None:
    """With the mode ``off`` no other variable is looked at, not even one with a bad value."""
    assert Settings.from_environ({envs.MODE: "off", variable: "nonsense"}) == Settings(mode="off")


def test_a_bad_value_is_a_value_error() -> None:
    """Whoever catches the natural builtin catches ours."""
    assert issubclass(SettingsError, ValueError)


def test_every_field_has_a_variable() -> None:
    """Each setting there is has one variable, and the tests of this file go through them all."""
    names = {field.name for field in dataclasses.fields(Settings)}
    assert names == {*FIELDS.values(), "platform"} == set(envs.VARIABLES)


def test_the_process_environment_is_the_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an argument the settings come from the process's own environment."""
    monkeypatch.setenv(envs.MODE, "off")
    assert Settings.from_environ().mode == "off"


def test_other_variables_are_left_alone() -> None:
    """A variable that is not one of ours is neither read nor refused."""
    others = dict.fromkeys([*envs.TOOL_VARIABLES, "SGLANG_USE_MUSA", "MUSA_HOME"], "x")
    assert Settings.from_environ(others) == Settings()


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("SGLANG_MUSA_EXT_KERNEL", "SGLANG_MUSA_EXT_KERNELS"),
        ("SGLANG_MUSA_EXT_CHECKS", "SGLANG_MUSA_EXT_CHECK"),
        ("SGLANG_MUSA_EXTCHECK", "SGLANG_MUSA_EXT_CHECK"),
        ("SGLANG_MUSA_EXT_WORKSPACE_MB", "SGLANG_MUSA_EXT_MLA_WORKSPACE_MB"),
        ("SGLANG_MUSA_EXT_VENDOR_INDICES", "SGLANG_MUSA_EXT_VENDOR_INDEX"),
    ],
)
def test_a_mistyped_variable_is_an_error_that_suggests_the_right_one(
    variable: str, meant: str
) -> None:
    """A name with this package's prefix that means nothing is refused; ``off`` does not look."""
    with pytest.raises(SettingsError, match=f"did you mean {meant}\\?") as caught:
        Settings.from_environ({variable: "mate"})
    assert caught.value.variable == variable
    assert Settings.from_environ({envs.MODE: "off", variable: "mate"}) == Settings(mode="off")


def test_a_variable_like_no_other_is_refused_with_the_list() -> None:
    """Where nothing is close, the error names the variables that there are."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({"SGLANG_MUSA_EXT_QQQQQQQQQQQQQQQQQQQ": "1"})
    for variable in (envs.KERNELS, envs.MLA_WORKSPACE_MB, envs.CHECK, envs.VENDOR_INDEX):
        assert variable in str(caught.value)


def test_settings_are_frozen() -> None:
    """Nobody changes a setting after it was read."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().mode = "on"  # type: ignore[misc]
