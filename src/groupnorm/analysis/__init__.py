"""Answers to the questions people ask around the operator: what bounds it and how far away that is (`roofline`), how
many groups (`advisor`), what a style is (`style`), how the other normalisations differ (`compare`).
"""

__all__: list[str] = []
