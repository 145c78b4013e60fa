"""What the commands print, draw and write for people to read.

Pages and tables for the terminal, plots, the study's HTML page.

May import: speed, demo and above.
"""
