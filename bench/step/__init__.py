"""Benchmarks of the whole training step.

command.py       `bench step`: its arguments and its table
data.py          configurations, and images of the right size
worker.py        the candidates, each in a process of its own
run.py           the candidates' turns, and the result
plot.py          the figures of a result
setup.py         networks, optimiser and schedules of the alternatives
published.py     the published algorithm; published_pil.py, its augmentation
plain.py         the same in vectorised PyTorch, eager or compiled
plain_network.py the networks of both
profile.py       `bench step-profile`      same_losses.py   `bench same-losses`
memory_bank.py   `bench memory-bank`
"""
