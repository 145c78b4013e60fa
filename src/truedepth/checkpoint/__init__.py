"""What is written.

Streamed safetensors and the files beside them, the model card, and what config.json records about
how a checkpoint was made.

May import: sources and above.
"""
