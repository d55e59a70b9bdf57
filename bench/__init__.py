"""Benchmarks. They come with the source tree and are not installed; `python -m bench` lists them.

commands.py   the commands by name
ops/          single ops and the whole contrast
step/         the whole training step
scaling/      several processes
gpu/          everything on a machine with a GPU
machine.py    machine description
results/      stored results
"""
