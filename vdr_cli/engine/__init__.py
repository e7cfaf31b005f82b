"""DeepSpeed: build, gather, step, checkpoint. Nothing else imports deepspeed.

Importing this package settles what DeepSpeed reads when it is imported itself, and keeps the library's
notices, which say nothing a user could act on, off the terminal. VDR_DEBUG=1 lets them through.
"""

import logging
import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

if os.environ.get("VDR_DEBUG") != "1":
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|transformers")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed|deepspeed")
