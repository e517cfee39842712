"""Whole models, stock beside converted: `groupnorm bench --models`.

`cases.py` builds them, `runner.py` verifies and times them, `memory.py` measures the peak in a process of its own,
`records.py` keeps what was found, `tables.py` shows it.
"""
