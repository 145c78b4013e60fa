"""What reaches the disk whole.

Output that is complete or absent, runs that resume, copying, scratch files. Knows no models.

May import: errors, progress, tensors.
"""
