"""What is written.

Streamed safetensors with what belongs beside them, the model card, and what config.json records of
how a checkpoint was made.

May import: sources and above.
"""
