"""The figures, by what they ask.

How good and how fast, for what cost? quality.py, throughput.py. How well do they denoise? losses.py, timesteps.py. What happens
inside? mixing.py, routing.py, load.py, masks.py. What comes out? pictures.py. How does a paper's look beside ours? published.py.
style.py and seeds.py say how all look and how seeds are drawn. They look for diagnostics by name and know no method.
`bench.plots` makes them all. No torch here.
"""
