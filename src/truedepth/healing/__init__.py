"""Training back toward the original.

Options, text, teacher, student, distillation, training, run.

May import: calibration and above.
"""
