"""Any model -> config, lazy tensors, tokenizer.

Hub ids, directories, GGUF files and the default model all become a `Source`; nothing behind this
room knows where a model came from.

May import: files, families, plan and above.
"""
