"""The one module that runs in vLLM's processes. This directory is their PYTHONPATH: nothing else may be in it."""
