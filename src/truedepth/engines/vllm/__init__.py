"""truedepth checkpoints in vLLM.

The entry point and vLLM's model classes with layers of other widths.

May import: what engines may.
"""
