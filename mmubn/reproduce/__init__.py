"""The paper's tables and figures: what to train, the trainings, and the report on them.

A new row or experiment belongs into :mod:`mmubn.reproduce.experiments`. So does a study, which
also tunes or pretrains: as the :class:`mmubn.reproduce.study.Study` of its experiment. The other
modules train and report what is declared there.
"""
