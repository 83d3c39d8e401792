"""The golden checkpoints of tools/make_goldens.py: where they are and what transformers said of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

DIRECTORY = Path(__file__).parent.parent / "goldens"
NAMES = sorted(path.parent.name for path in DIRECTORY.glob("*/golden.npz"))


@dataclass(frozen=True)
class Golden:
    """`tokens[i]` is what decode step i is given; `decode_logits[i]` is what follows it."""

    directory: Path
    prompt: np.ndarray
    prefill_logits: np.ndarray
    tokens: np.ndarray
    decode_logits: np.ndarray


def golden(name):
    with np.load(DIRECTORY / name / "golden.npz", allow_pickle=False) as arrays:
        return Golden(DIRECTORY / name, **{key: arrays[key] for key in arrays.files})
