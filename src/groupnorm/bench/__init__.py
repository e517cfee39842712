"""Measurements: named cases, rivals behind one signature, verification before timing, and tables made from the records.

cases.py what is measured, rivals.py against whom, timing.py how, runner.py does it, records.py keeps it, report.py
and chart.py print it. promises.py tries the promises about numbers, picture.py belongs to the
demonstration.
"""
