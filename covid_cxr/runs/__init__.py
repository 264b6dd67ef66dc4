"""A run and what is done with finished ones: training, the folder, the test log, external tests, comparison, cross-validation"""
