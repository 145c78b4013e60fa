"""Support for truedepth checkpoints in vLLM.

The plugin's entry point, and vLLM's model classes with layers of different widths.

May import: what engines may.
"""
