"""The network: its settings, weights that are proven, encoders from any source, and the head"""
