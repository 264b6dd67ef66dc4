"""Several findings on one image: labels, metrics, and a network that answers for each of them"""
