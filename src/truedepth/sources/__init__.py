"""Any model -> config, lazy tensors, tokenizer.

Hub ids, directories, GGUF files and the default model all become a `Source`; no other folder
knows where a model came from.

May import: files, families, plan and above.
"""
