"""A plan's groups as layers.

The paper's equation (`widen.py`), heads of zeros, and the layout of a converted model.

May import: runtime and above.
"""
