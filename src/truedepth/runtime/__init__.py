"""Models that run, whole or layer by layer.

Loading, devices, layers loaded into memory one at a time, the head, generation, llama.cpp.

May import: sources, checkpoint and above.
"""
