"""pass@k, unbiased."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> NDArray[np.float64]:
    """Probability that at least one of k completions solves the prompt, from c solved among n drawn.

    1 - C(n-c, k) / C(n, k)  (Chen et al. 2021, eq. 1), as the product Π_{j<k} (n-c-j)/(n-j), so no binomial
    coefficient overflows. Elementwise over n and c; k must not exceed any n.
    """
    drawn, solved = np.broadcast_arrays(np.asarray(n, np.float64), np.asarray(c, np.float64))
    if k < 1 or (drawn.size and k > drawn.min()):
        raise ValueError(f"pass@{k} needs 1 <= k <= completions per prompt ({drawn.min() if drawn.size else 0:.0f})")
    if (solved < 0).any() or (solved > drawn).any():
        raise ValueError("solved counts must lie between 0 and n")
    all_fail = np.ones(drawn.shape)
    for j in range(k):
        all_fail *= np.maximum(drawn - solved - j, 0.0) / (drawn - j)
    return 1.0 - all_fail
