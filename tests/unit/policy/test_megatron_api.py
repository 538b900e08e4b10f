"""Config fields that a Megatron-Core does not have: an error, unless a reason is given."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest

from gdpo_megatron.platform import detect_platform
from gdpo_megatron.platform.megatron_versions import megatron_version


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    detect_platform().prepare_megatron()


@pytest.fixture
def api() -> Any:
    from gdpo_megatron.policy import megatron_api

    return megatron_api


@dataclass
class Config:
    kept: int = 0


def test_known_fields_arrive(api: Any) -> None:
    config = api.build_config(Config, kept=3)
    assert config == Config(3)
    api.set_fields(config, kept=4)
    assert config == Config(4)


def test_vanished_field_is_an_error(api: Any) -> None:
    """Assigned by itself it would be taken and do nothing."""
    shown = ".".join(map(str, megatron_version()))
    message = rf"Config of megatron-core {shown} has no field 'gone'; .*LEFT_OUT"
    with pytest.raises(TypeError, match=message):
        api.build_config(Config, kept=3, gone=1)
    config = Config()
    with pytest.raises(TypeError, match=message):
        api.set_fields(config, gone=1)
    assert not hasattr(config, "gone")


@pytest.mark.parametrize(("version", "fine"), [((0, 16, 1), True), ((0, 19, 0), False)])
def test_reasons_hold_for_their_versions_only(
    version: tuple[int, int, int], fine: bool, api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "megatron_version", lambda: version)
    monkeypatch.setitem(api.LEFT_OUT, "new", api.Absent((0, 19, 0), "nothing to switch off"))
    if fine:
        assert api.build_config(Config, kept=3, new=False) == Config(3)
    else:
        with pytest.raises(TypeError, match=r"0\.19\.0 has no field 'new'"):
            api.build_config(Config, kept=3, new=False)


def test_reasons_are_of_fields_that_exist_elsewhere(api: Any) -> None:
    """A row for the installed version names what it lacks; the other rows what it has."""
    from megatron.core.transformer import TransformerConfig

    names = {field.name for field in fields(TransformerConfig)}
    for name, absent in api.LEFT_OUT.items():
        assert (name in names) == (megatron_version() >= absent.before)
        assert absent.reason


def test_expected_warnings_are_silent_and_others_are_not(
    api: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    log = logging.getLogger("megatron.core.models.gpt.gpt_model")
    log.warning("GPTModel IS DEPRECATED. GPTModel is only accepting fixes")
    log.warning("something else")
    assert caplog.messages == ["something else"]
