"""Sweeps: many runs from one file, their progress, table and figure.

config.py    the sweep file and the configurations of its runs
run.py       the runs as processes
progress.py  progress on standard error
table.py     the table            figure.py  its figure
"""
