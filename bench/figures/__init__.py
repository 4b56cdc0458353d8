"""The figures by what they show: losses.py (how well), inside.py (what happens inside), outcome.py (what came out).

They look for diagnostics by name and know no method. `bench.plots` makes them all. No torch here.
"""
