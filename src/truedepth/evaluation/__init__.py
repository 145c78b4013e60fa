"""How much a model loses against its original.

NLL, excess loss, KL and top-1 agreement; perplexity; accuracy on benchmarks.

May import: widening and above.
"""
