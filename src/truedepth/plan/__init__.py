"""What runs beside what.

Plans, the spans of layers they are written as, plan files, plans in config.json, and the choice
of the cheapest plans where costs add up. Knows no torch.

May import: errors.
"""
