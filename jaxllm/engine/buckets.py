"""How much of what there is to compute goes into one step, where steps are padded to a few sizes.

In: how many tokens wait, and how many of them every step computes (decodes). Out: most tokens of the next step. Knows
nothing of sequences, pages or policies.

1,100 tokens padded to 2,048 take as long as 2,048. Steps of 1,024 and 128 compute the same in little more than half of
that; the first answer comes sooner and other streams stand still for less time at once. The rest is not free, as every
step reads the weights: one of few tokens counts as one of `few`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

# Measured on an H200, bf16. Reading a dense model's weights takes as long as multiplying with so many tokens: products
# of the 8B shape take 4.0 ms at one token, 6.9 at 256 and 21 us a token beyond.
FEW_TOKENS = 256
# Kernels of a step with prefills are launched one by one: 0.6B shape, 7.6 ms for 1024 tokens and 34.7 for 8192, so
# 3.7 ms for none in 28 layers.
LAYER_S = 130e-6
FLOPS_PER_S = 700e12  # of large products


def few_tokens(layers: int, token_weights: float, sparsity: float = 1.0, devices: int = 1) -> int:
    """Tokens below which a step hardly gets faster. `token_weights`: that one token passes; `sparsity`: how many times
    as many there are; `devices`: that share each product."""
    token_s = 2 * token_weights / FLOPS_PER_S / devices
    return round(max(FEW_TOKENS * sparsity, layers * LAYER_S / token_s))


@dataclass(frozen=True)
class Padding:
    """What steps with prefills are padded to."""

    sizes: tuple[int, ...] = ()  # ascending; empty: such steps are not padded
    few: int = FEW_TOKENS

    def budget(self, most: int, decodes: int, lengths: Iterable[int]) -> int:
        """Tokens of a step that may have `most`; `lengths` are those of what waits, in its order."""
        wanted = decodes
        for length in lengths if self.sizes else ():
            wanted += length
            if wanted >= most:
                return most
        return most if wanted == decodes else self.best(wanted, decodes)

    def best(self, tokens: int, decodes: int) -> int:
        """The size above `tokens`; or the one below, if with it and the steps of the rest an eighth of that is saved.

        For less, prompts that came together would end apart, and each step has its launches and its decodes.
        """
        sizes, few = self.sizes, self.few
        place = bisect_left(sizes, tokens)
        above, below = sizes[place], sizes[place - 1]
        least = whole = max(above, few)
        spent = 0  # on steps that are full
        while place and sizes[place - 1] > decodes:  # else nothing but the decodes would get on
            spent += max(sizes[place - 1], few)
            if spent + few >= least:
                break
            tokens -= sizes[place - 1] - decodes
            place = bisect_left(sizes, tokens)
            least = min(least, spent + max(sizes[place], few))
        return below if 8 * least <= 7 * whole else above


UNPADDED = Padding()
