"""Configuration: pydantic models, YAML, --set overrides and their error messages. No torch here.

The models are imported when one of them is first asked for: what `vdr --help` needs of this package is described.py,
and pydantic takes as long as all the rest of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdr_cli.config.schema import (
        BonusConfig,
        Config,
        DataConfig,
        DisagreementConfig,
        EngineConfig,
        GrpoConfig,
        LaunchConfig,
        ModelConfig,
        ObserveConfig,
        RewardsConfig,
        RolloutConfig,
        TrainConfig,
    )

__all__ = [
    "BonusConfig",
    "Config",
    "DataConfig",
    "DisagreementConfig",
    "EngineConfig",
    "GrpoConfig",
    "LaunchConfig",
    "ModelConfig",
    "ObserveConfig",
    "RewardsConfig",
    "RolloutConfig",
    "TrainConfig",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vdr_cli.config import schema

    return getattr(schema, name)
