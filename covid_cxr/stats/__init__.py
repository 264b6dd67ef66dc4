"""Statistics that know about patients: resampling, calibration, paired comparison"""
