"""What both plug-ins share: the switch."""

from __future__ import annotations

import logging

import pytest

from tilewise.integrations.host import switched_off, switched_on


@pytest.mark.parametrize(
    ("value", "off", "on", "said"),
    [
        (None, False, False, False), ("", False, False, False), ("1", False, True, False),
        ("on", False, True, False), (" True", False, True, False), ("0", True, False, False),
        ("False", True, False, False), ("off", True, False, False), ("no", True, False, False),
        ("maybe", True, False, True),
    ],
)  # fmt: skip
def test_the_switch(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    value: str | None,
    off: bool,
    on: bool,
    said: bool,
) -> None:
    monkeypatch.delenv("TILEWISE_ANY", raising=False)
    if value is not None:
        monkeypatch.setenv("TILEWISE_ANY", value)
    assert switched_off("TILEWISE_ANY", logging.getLogger("any")) is off
    assert switched_on("TILEWISE_ANY") is on
    assert ("neither 0 nor 1" in caplog.text) is said
