"""A plan's groups as layers.

The paper's equation (`widen.py`), padding with zero heads, and the layout of a converted model.

May import: runtime and above.
"""
