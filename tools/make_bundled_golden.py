"""What Hugging Face transformers says of the bundled models: logits of one prompt, and the text of one chat prompt.

Runs where torch and transformers are (not in .venv). Writes tests/goldens/bundled-NAME.npz; every eighth column is
kept, which is enough to catch any difference and keeps the file small.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from make_bundled_golden_texts import COLUMNS, MESSAGES, TEXT  # beside this script
from transformers import AutoModelForCausalLM, AutoTokenizer  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parent.parent


def main() -> None:
    for name in ("first-light", "first-light-draft"):
        directory = ROOT / "jaxllm" / "models" / name
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = tokenizer(TEXT).input_ids
        chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :, ::COLUMNS].numpy()
        np.savez_compressed(ROOT / "tests" / "goldens" / f"bundled-{name}.npz", ids=ids, logits=logits, chat=chat)


if __name__ == "__main__":
    main()
