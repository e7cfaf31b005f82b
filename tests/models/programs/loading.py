"""Try to load two models that are nowhere; then say whether the hub is left alone from here on."""

from huggingface_hub import constants

from vdr_cli.errors import ConfigError
from vdr_cli.models.loading import load_model_config

for name in ("runs/nothere", "runs/neither"):
    try:
        load_model_config(name)
    except ConfigError as error:
        print(error)
print(constants.HF_HUB_OFFLINE)
