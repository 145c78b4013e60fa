"""Training back toward the original.

Options, text, teacher, distillation, what is trained, the training, the run.

May import: calibration and above.
"""
