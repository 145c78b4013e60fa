"""Serving engines that run truedepth checkpoints."""
