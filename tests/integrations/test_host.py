"""What both plug-ins share: the switch."""

from __future__ import annotations

import logging

import pytest

from tilewise.integrations.host import switched_off


@pytest.mark.parametrize(
    ("value", "off", "said"),
    [
        (None, False, False), ("", False, False), ("1", False, False), ("on", False, False),
        ("0", True, False), ("False", True, False), ("off", True, False), ("no", True, False),
        ("maybe", True, True),
    ],
)  # fmt: skip
def test_the_switch(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    value: str | None,
    off: bool,
    said: bool,
) -> None:
    monkeypatch.delenv("TILEWISE_ANY", raising=False)
    if value is not None:
        monkeypatch.setenv("TILEWISE_ANY", value)
    assert switched_off("TILEWISE_ANY", logging.getLogger("any")) is off
    assert ("neither 0 nor 1" in caplog.text) is said
