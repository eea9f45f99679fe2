"""Our models made known to transformers' Auto classes as soon as there are any, and no sooner.

transformers takes seconds to import, and users of the layer alone need not even have it: `import
moebert_kernels` leaves it alone. `register_when_imported` waits for the module that has `AutoConfig`, whoever
imports it, and gives it a stand-in for each of our configurations. When `AutoConfig` asks one to read a
configuration, the family's classes are made, see `models.modeling.moe_classes`, and registered in its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from moebert_kernels.awaited import when_imported


def register_when_imported() -> None:
    """Register now if `AutoConfig` is there, otherwise when its module has been imported."""
    when_imported("transformers.models.auto.configuration_auto", _register)


def _register() -> None:
    # Whatever is imported here is imported amid the imports of transformers: none of its models may be.
    try:
        from transformers.models.auto.configuration_auto import AutoConfig

        from moebert_kernels.models.families import FAMILIES

        for family in FAMILIES:
            AutoConfig.register(family.moe_type, _stand_in(family.moe_names[0]), exist_ok=True)
    except Exception as error:  # of a version that we do not know: its import is not ours to break
        warnings.warn(
            f"moebert_kernels cannot make its models known to transformers: {type(error).__name__}: {error}",
            stacklevel=2,
        )


class _StandIn:
    """What `AutoConfig` calls of a configuration's class, done by the class itself."""

    config_name: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._config()(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """See `PreTrainedConfig.from_dict`."""
        return cls._config().from_dict(config_dict, **kwargs)

    @classmethod
    def _config(cls) -> Any:
        from moebert_kernels import models

        return getattr(models, cls.config_name)


def _stand_in(config_name: str) -> Any:
    return type(f"{config_name}StandIn", (_StandIn,), {"config_name": config_name})
