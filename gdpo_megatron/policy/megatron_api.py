"""Where objects of megatron.core are built, the same way on every version that is supported.

Versions add config fields and take them away. A dataclass that is given an unknown name fails; a
config that is assigned one goes on without a word, and what was asked for does not happen. So both
go through `build_config` and `set_fields`, which leave a field out only where LEFT_OUT says why
that is right, and only in the versions that it names. `build_gpt` is the one place that knows the
model's class, which 0.19 announces to end.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron.core.models.gpt import GPTModel

from gdpo_megatron.platform.megatron_versions import Version, megatron_version, shown

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Absent:
    """A config field that versions before `before` do not have, and need not have."""

    before: Version
    reason: str


LEFT_OUT: dict[str, Absent] = {
    "fused_residual_rmsnorm": Absent((0, 19, 0), "there is no such kernel to switch off"),
}

_QUIET = {
    # Said at each model and each DDP: of the class below, and of a layout that DDP makes itself.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
}
for _name, _text in _QUIET.items():
    logging.getLogger(_name).addFilter(lambda record, text=_text: text not in record.getMessage())


def build_config(kind: type[ConfigT], **fields: Any) -> ConfigT:
    """A config of Megatron's.

    Args:
        kind: one of its dataclasses.
        **fields: by name.

    Raises:
        TypeError: the installed version has no such field, and LEFT_OUT has no reason to do
            without.
    """
    return kind(**_known(kind, fields))


def set_fields(config: Any, **fields: Any) -> None:
    """Assign to fields of one of Megatron's configs; raises as `build_config` does."""
    for name, value in _known(type(config), fields).items():
        setattr(config, name, value)


def _known(kind: Any, fields: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    version = megatron_version()
    for name in fields.keys() - names:
        if name not in LEFT_OUT or version >= LEFT_OUT[name].before:
            raise TypeError(
                f"{kind.__name__} of megatron-core {shown(version)} has no field '{name}'; find "
                f"out what became of it, and add it to LEFT_OUT in {__name__} if it can be left out"
            )
    return {name: value for name, value in fields.items() if name in names}


def build_gpt(config: Any, spec: Any, **arguments: Any) -> GPTModel:
    """The model that everything here trains: Megatron's GPTModel, on all supported versions.

    0.19 calls it deprecated in favour of HybridModel, whose patterns number layers and name
    checkpoint keys differently. It is one class for as long as both have it.
    """
    return GPTModel(config, spec, **arguments)
