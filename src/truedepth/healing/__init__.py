"""Training back toward the original.

Options, text, answers, teacher, student, rollouts, distillation, training, run.

May import: calibration and above.
"""
