"""Model directories without weights: a shape in configs/models becomes a config.json for `load_format="dummy"`.

python benchmarks/shapes.py llama-3.1-8b DIRECTORY      # writes DIRECTORY/llama-3.1-8b
"""

import json
import sys
import tomllib
from pathlib import Path

SHAPES = Path(__file__).parent.parent / "configs" / "models"


def make_model_directory(shape: str, parent: Path) -> Path:
    """Write `parent/shape/config.json`; prompts are token ids, so there is no tokenizer."""
    directory = parent / shape
    directory.mkdir(parents=True, exist_ok=True)
    config = tomllib.loads((SHAPES / f"{shape}.toml").read_text())
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


if __name__ == "__main__":
    print(make_model_directory(sys.argv[1], Path(sys.argv[2])))
