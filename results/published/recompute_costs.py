"""How is computed_costs.csv made? `.venv/bin/python results/published/recompute_costs.py`: some minutes on a CPU."""

from bench.job import build_method, make_config
from bench.published.costs import write_costs
from bench.published.table import load_published_suite, published_names
from bench.suite import suite_runs

if __name__ == "__main__":
    write_costs([(name, suite_runs(load_published_suite(name), [], make_config)) for name in published_names()], build_method)
