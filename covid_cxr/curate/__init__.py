"""Bringing data in good order: licences, patient ids, downloads, and the report on data quality"""
