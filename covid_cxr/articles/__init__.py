"""Five published articles, their reported results, and what they look like here"""
