"""What the layers of an architecture are made of, as data.

One small file per family. `family.py` says what a family may hold; `lookup.py` finds the family
of a config.json.

May import: errors.
"""
