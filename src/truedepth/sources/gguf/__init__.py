"""GGUF files as sources.

A checked reader, tensors and tokenizer under transformers' names, llama.cpp's order of rows.

May import: what sources may.
"""
