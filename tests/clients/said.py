"""What every client is asked for, and one line a check: OK or what went wrong. Exit code 1 when anything did."""

import sys
import traceback
from importlib.metadata import version

MODEL = "first-light"
QUESTION = [{"role": "user", "content": "Hello!"}]
CITY = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
EXTRACT = [{"role": "user", "content": 'Extract name and age as JSON: "Maria is 31 years old."'}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


def run(package, checks):
    """Each check is a function that raises, or gives what it saw."""
    wrong = 0
    for check in checks:
        what = check.__name__.replace("_", " ")
        try:
            seen = check()
        except Exception as error:
            wrong += 1
            traceback.print_exc()
            print(f"{package} {version(package)}: {what}: FAILED: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"{package} {version(package)}: {what}: OK  {seen!r}"[:200], flush=True)
    sys.exit(wrong > 0)
