"""Trained runs side by side: comparisons, pictures, pages.

    runs.py                 run folders, their settings and models
    stored_evaluations.py   evaluations that are kept beside the weights
    groups.py               rows: runs that differ in seed and fold alone
    statistics.py           means, and whether two rows differ by more than noise
    comparison.py           a comparison as data
    compare.py              making it
    tables.py               a comparison as Markdown, CSV and text
    per_image.py            the score of each image, and which are shown
    predict.py              images that are in no data set
    curves.py               how a training went
    score_figures.py        one model's scores
    gallery.py              the best and the worst images
    visualise.py            all of them, as a folder: `report --draw`
    report/                 the page

It knows no stores and no trainings: a run is a folder of files.
"""
