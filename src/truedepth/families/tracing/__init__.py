"""Families that no file describes: what their layers are made of, found by running a small model.

May import: errors, modeling, families.
"""
