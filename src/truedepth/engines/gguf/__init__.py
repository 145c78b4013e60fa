"""Export of checkpoints to GGUF files.

The file, its tokenizer, its types, and weights balanced for quantizers.

May import: what engines may.
"""
