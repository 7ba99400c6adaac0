"""The small study behind `python bench/learn.py`: which Combiner learns what, at which cost.

`rows` says what is compared, `data` draws clips and questions, `run` trains and measures one model, `queue` runs all
that is missing, `report` and `plots` tell what came out.
"""
