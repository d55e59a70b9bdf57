"""Configuration: schema, YAML files, and the papers' values."""

from prcl_fast.config.contrast import ContrastConfig
from prcl_fast.config.schema import (
    NEUTRAL_KEYS,
    AugmentConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    SyntheticConfig,
    TrainConfig,
    config_fingerprint,
    dump_config,
    json_schema,
    load_config,
    override_config,
    parse_config,
)

__all__ = [
    "NEUTRAL_KEYS",
    "AugmentConfig",
    "Config",
    "ContrastConfig",
    "DataConfig",
    "EvalConfig",
    "ModelConfig",
    "OptimConfig",
    "SyntheticConfig",
    "TrainConfig",
    "config_fingerprint",
    "dump_config",
    "json_schema",
    "load_config",
    "override_config",
    "parse_config",
]
