"""Trained runs side by side: comparisons, pictures, pages.

    runs.py                 run folders, their settings and models
    stored_evaluations.py   evaluations that are stored with the weights
    groups.py               rows: runs that differ only in seed and fold
    statistics.py           means, and whether two rows differ by more than noise
    task_views.py           how each task is compared and drawn: the table of tasks
    comparison.py           a comparison as data
    compare.py              how it is made
    tables.py               a comparison as Markdown, CSV and text
    per_image.py            the score of each image, and the choice of images to show
    predict.py              predictions for images outside any data set
    curves.py               the course of a training
    score_figures.py        one model's scores
    gallery.py              the best and the worst images
    visualise.py            all of them, as a folder: `report --draw`
    report/                 the page

This room imports neither caches nor trainings: a run is a folder of files.
"""
