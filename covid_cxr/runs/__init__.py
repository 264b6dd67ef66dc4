"""A run and what follows it: training, the folder, the test log, external tests, comparison"""
