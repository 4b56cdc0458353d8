"""How does a comparison become one HTML file that opens from disk, with its tables, figures and every run behind them?

material.py brings together what is shown; summary.py, sections.py, methods.py and run_pages.py say what of it stands where, and
chart.py and pictures.py draw; page.py puts that into page.html, with report.css and report.js. No torch here.
"""

from bench.report.material import Material, draw_figures, figures_in
from bench.report.page import page_of

__all__ = ["Material", "draw_figures", "figures_in", "page_of"]
