"""Benchmarks of training on several processes.

command.py         `bench scaling`: its arguments and its tables
traffic.py         the collectives of a step, and their time by formula
run.py             training that counts them: on real processes, or one real rank among simulated ones
process_groups.py  the process groups that count
plot.py            the figure of a result
same_processes.py  `bench same-processes`
"""
