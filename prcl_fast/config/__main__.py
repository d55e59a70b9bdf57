"""Prints the JSON schema of a configuration: `python -m prcl_fast.config > configs/schema.json`."""

import json

from prcl_fast.config import json_schema

print(json.dumps(json_schema(), indent=1))
