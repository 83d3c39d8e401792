"""Model directories without weights: a shape in configs/models becomes a config.json for `load_format="dummy"`."""

import json
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
