"""The paper's tables and figures: what to train, the trainings, and the report on them.

A new row or experiment belongs into :mod:`mmubn.reproduce.experiments`.
"""
