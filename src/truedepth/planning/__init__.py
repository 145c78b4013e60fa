"""Which plan under a budget.

Candidates scored alone, the best plans by their sum, plans measured whole.

May import: engines and above.
"""
