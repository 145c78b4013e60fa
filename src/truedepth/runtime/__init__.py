"""A model that runs, whole or layer by layer.

Loading, devices, layers that come into memory one at a time, the head, generation, llama.cpp.

May import: sources, checkpoint and above.
"""
