"""What runs beside what.

Plans, the spans they are written as, plan files, plans in config.json, and the choice of plans
whose costs add up. Knows no torch.

May import: errors.
"""
