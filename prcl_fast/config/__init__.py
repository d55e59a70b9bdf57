"""Configuration: schema, YAML files, and the papers' values."""

from prcl_fast.config.contrast import ContrastConfig
from prcl_fast.config.data import AugmentConfig, DataConfig, SyntheticConfig
from prcl_fast.config.schema import (
    NEUTRAL_KEYS,
    PROCESS_KEYS,
    Config,
    config_fingerprint,
    dump_config,
    flat_config,
    json_schema,
    load_config,
    load_stored_config,
    override_config,
    parse_config,
    parse_stored_config,
)
from prcl_fast.config.sections import EvalConfig, ModelConfig, OptimConfig, TrainConfig

__all__ = [
    "NEUTRAL_KEYS",
    "PROCESS_KEYS",
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
    "flat_config",
    "json_schema",
    "load_config",
    "load_stored_config",
    "override_config",
    "parse_config",
    "parse_stored_config",
]
