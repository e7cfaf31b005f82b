"""DeepSpeed and the process group: build, gather, step, checkpoint.

Nothing else imports deepspeed, and here only deepspeed_import.py does.

Importing this package keeps the library's notices, which say nothing a user could act on, off the terminal.
VDR_DEBUG=1 lets them through. It imports no torch: what reads a DeepSpeed JSON (ds_config.py) does without.
"""

import logging
import os
import warnings

if os.environ.get("VDR_DEBUG") != "1":
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|transformers")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed|deepspeed")
