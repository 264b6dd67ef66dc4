"""What else could explain the number? Baselines without lungs and the checks of a finished run"""
