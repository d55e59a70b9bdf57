"""Analysis of finished runs: figures, comparison of runs, and the representation space.

figures.py           RUN/figures: curves.py, panel.py
comparison.py        `prcl compare`: groups over seeds; comparison_files.py, seed_statistics.py
embedding_report.py  `prcl analyse`: embedding.py, prototypes.py, prototype_path.py, cluster_quality.py,
                     embedding_figures.py
step_time.py         the bars of `prcl profile` and `bench step`
style.py             the style of all figures
"""
