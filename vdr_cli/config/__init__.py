"""Configuration: pydantic models, YAML, --set overrides and their error messages. No torch here."""

from vdr_cli.config.schema import (
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
