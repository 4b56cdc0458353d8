"""Which methods are compared? One line each; everything else about a method is in its own file."""

from bench.method import Method
from methods.dense import Dense
from methods.dit_moe import DiTMoE
from methods.dtr import DTR
from methods.multi_expert import MultiExpert
from methods.remix_dit import RemixDiT
from methods.switch_dit import SwitchDiT

METHODS: dict[str, type[Method]] = {
    "dense": Dense,
    "multi_expert": MultiExpert,
    "dtr": DTR,
    "switch_dit": SwitchDiT,
    "dit_moe": DiTMoE,
    "remix_dit": RemixDiT,
}
