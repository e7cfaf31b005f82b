"""Sizes that decide how the model is read. They are apart from the code that reads it, so that `vdr plan` computes with
the same numbers and imports no torch.
"""

from __future__ import annotations

CHUNK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Bytes of the (rows, V) buffers of one chunk of logits: enough rows for a matrix product to run at full speed."""

TREE_TOKENS = 256
"""Most tokens of a prompt's completions together for which the update reads them in one row (prompt_tree.py)."""

PACKED_TOKENS = 4096
"""Fewest tokens of the longest completion for which the update reads rows without padding inside (packed_rows.py).

There the mask that sharing a prompt needs takes more memory than the prompt's other copies: in bfloat16, per token of a
completion, 2 (P + T) bytes of mask in every layer, against (G - 1)/G · P/T of what the layer keeps.
"""

JUDGED_TOKENS = 16_384
"""Tokens of one forward of a reward model on an accelerator, padding included. Memory, never the result."""

MOST_OF_MEMORY = 0.7
"""Largest part of a GPU's free memory, beside the model states, that a full copy of the weights may take."""

SERVER_MARGIN = 0.05
"""Share of a GPU that neither a vLLM server nor the trainer beside it plans for: kernels, contexts, fragmentation."""
