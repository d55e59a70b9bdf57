"""Generated files of the configuration: its JSON schema, and the page of settings.

python -m prcl_fast.config > configs/schema.json
python -m prcl_fast.config --settings > docs/settings.md
"""

import argparse
import json

from prcl_fast.config import json_schema
from prcl_fast.config.settings_page import settings_page

parser = argparse.ArgumentParser(prog="python -m prcl_fast.config", description="Print the JSON schema.")
parser.add_argument("--settings", action="store_true", help="print docs/settings.md instead")
if parser.parse_args().settings:
    print(settings_page(json_schema()), end="")
else:
    print(json.dumps(json_schema(), indent=1))
