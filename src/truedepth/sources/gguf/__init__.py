"""GGUF files as sources.

The file's reader, its tensors and tokenizer as transformers has them, llama.cpp's order of rows.

May import: what sources may.
"""
