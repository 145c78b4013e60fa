"""Closed-form repair of wide layers.

Text windows, ridge regression, the refit of one layer, both models side by side, the run.

May import: evaluation and above.
"""
