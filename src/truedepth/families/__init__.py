"""What the layers of an architecture are made of, as data.

One small file per family; `family.py` says what they may hold, `lookup.py` finds the one of a
config.json.

May import: errors.
"""
